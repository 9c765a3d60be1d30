"""Tensors between JAX and other frameworks: the same memory where it can be shared, the same numbers everywhere."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant.interop import dlpack

SHAPE = (6, 64)


def optional(name):
    """Import a framework, or skip with the extra that brings it."""
    extra = name.partition(".")[0]
    return pytest.importorskip(name, reason=f"needs the extra jaxquant[{extra}]")


def numbers(dtype="float32"):
    return jnp.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)


def address(x):
    return x.unsafe_buffer_pointer()


def as_numpy(x):
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


def aligned(shape=SHAPE, dtype=np.float32):
    """A NumPy array at an address that XLA can use in place."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(count + 64, np.uint8)
    first = -memory.ctypes.data % 64
    out = memory[first : first + count].view(dtype).reshape(shape)
    out[:] = np.arange(out.size).reshape(shape)
    return out


TORCH_DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "uint8", "int8", "int32", "uint16", "bool"]


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_shares_memory_both_ways(dtype):
    torch = optional("torch")
    theirs = torch.arange(np.prod(SHAPE)).reshape(SHAPE).remainder(7).to(getattr(torch, dtype))
    assert theirs.data_ptr() % 64 == 0
    ours = dlpack.to_jax(theirs)
    assert address(ours) == theirs.data_ptr()
    assert (str(ours.dtype), ours.shape) == (dtype, SHAPE)
    np.testing.assert_array_equal(as_numpy(ours.astype(jnp.float32)), theirs.float().numpy())
    back = dlpack.from_jax(ours, torch)
    assert back.data_ptr() == theirs.data_ptr()
    assert back.dtype == theirs.dtype
    copied = dlpack.from_jax(ours, torch, copy=True)
    assert copied.data_ptr() != theirs.data_ptr()
    copied.zero_()
    assert theirs.float().sum() > 0
    assert address(dlpack.to_jax(theirs, copy=True)) != theirs.data_ptr()


def test_torch_views():
    torch = optional("torch")
    x = torch.arange(4096, dtype=torch.float32).reshape(64, 64)
    for shared in (x.T, x[3:], x.view(4, 16, 64).permute(0, 2, 1), x[:0], torch.tensor(3.0)):
        ours = dlpack.to_jax(shared)
        np.testing.assert_array_equal(np.asarray(ours), shared.numpy())
        assert not shared.numel() or address(ours) == shared.data_ptr()
    for name, view in {"columns": x[:, ::2], "repeated": x[:1].expand(5, 64), "rows": x[::3]}.items():
        np.testing.assert_array_equal(np.asarray(dlpack.to_jax(view)), view.numpy(), err_msg=name)
        with pytest.raises(ValueError, match="cannot be shared without a copy: its strides are not compact"):
            dlpack.to_jax(view, copy=False)
    unaligned = x.reshape(-1)[1:]
    np.testing.assert_array_equal(np.asarray(dlpack.to_jax(unaligned)), unaligned.numpy())
    with pytest.raises(ValueError, match="not aligned to 64 bytes"):
        dlpack.to_jax(unaligned, copy=False)


def test_torch_tensors_that_are_no_plain_memory():
    torch = optional("torch")
    x = torch.ones(3)
    with pytest.raises(BufferError, match="require gradient"):
        dlpack.to_jax(x.clone().requires_grad_())
    with pytest.raises(BufferError, match="conjugate"):
        dlpack.to_jax(x.to(torch.complex64).conj())
    with pytest.raises(BufferError, match="layout"):
        dlpack.to_jax(x.to_sparse())
    with pytest.raises(ValueError, match="meta"):
        dlpack.to_jax(x.to("meta"))


def test_a_shared_buffer_is_one_buffer():
    torch = optional("torch")
    theirs = torch.zeros(64)
    ours = dlpack.to_jax(theirs)
    theirs[3] = 5
    assert float(ours[3]) == 5  # why a tensor that is still written to needs copy=True
    apart = dlpack.to_jax(theirs, copy=True)
    theirs[3] = 7
    assert float(apart[3]) == 5


def test_numpy():
    x = aligned()
    ours = dlpack.to_jax(x)
    assert address(ours) == x.ctypes.data
    back = dlpack.from_jax(ours, np)
    assert back.ctypes.data == x.ctypes.data
    assert not back.flags.writeable
    fixed = x.copy()
    fixed.flags.writeable = False
    cases = [fixed, x[::-1], x[:, ::2], x.astype(">f4"), x.astype(ml_dtypes.bfloat16), x.astype(bool)]
    for case in cases:
        ours = dlpack.to_jax(case)
        np.testing.assert_array_equal(np.asarray(ours).astype(np.float32), case.astype(np.float32))
        assert ours.dtype == case.dtype.newbyteorder("=")
    for case in cases[:5]:
        with pytest.raises(ValueError, match="cannot be shared without a copy"):
            dlpack.to_jax(case, copy=False)
    for case in (np.array(["a"]), np.zeros(3, "i4,f4")):
        with pytest.raises(TypeError, match="x must hold numbers"):
            dlpack.to_jax(case)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.data())
def test_any_view_of_numpy(shape, data):
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    steps = data.draw(st.tuples(*[st.sampled_from([1, 2, -1, -2]) for _ in shape]))
    order = data.draw(st.permutations(range(len(shape))))
    view = x[tuple(slice(None, None, step) for step in steps)].transpose(order)
    np.testing.assert_array_equal(np.asarray(dlpack.to_jax(view)), view)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "complex128"])
def test_no_number_is_narrowed_in_silence(dtype):
    """JAX itself would make 0 of 2**40."""
    with pytest.raises(TypeError, match=f"x has dtype {dtype}, which JAX would hold in 32 bits"):
        dlpack.to_jax(np.array([2**40]).astype(dtype))
    with jax.enable_x64(True):
        assert int(dlpack.to_jax(np.array([2**40]).astype(dtype))[0].real) == 2**40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "int32", "bool"])
def test_mlx(dtype):
    """On a CPU MLX neither places arrays where XLA can use them nor borrows memory: one copy each way."""
    mx = optional("mlx.core")
    ours = numbers(dtype)
    theirs = dlpack.from_jax(ours, mx)
    assert theirs.dtype == getattr(mx, dtype if dtype != "bool" else "bool_")
    back = dlpack.to_jax(theirs)
    assert back.dtype == ours.dtype
    np.testing.assert_array_equal(as_numpy(back), as_numpy(ours))
    for view in (theirs[:, ::2], theirs[::2], mx.broadcast_to(theirs[:1], SHAPE), theirs.T):
        found = as_numpy(dlpack.to_jax(view))
        np.testing.assert_array_equal(found, np.array(view.astype(mx.float32)).astype(found.dtype))
    if mx.default_device() == mx.cpu:
        with pytest.raises(ValueError, match=r"mlx.core does not take .* without a copy"):
            dlpack.from_jax(ours, mx, copy=False)


def test_mlx_shares_with_torch_on_a_cpu():
    """What the table in the documentation says of the way round JAX."""
    mx, torch = optional("mlx.core"), optional("torch")
    theirs = mx.arange(4096)
    mx.eval(theirs)
    assert torch.from_dlpack(theirs).data_ptr() == np.asarray(memoryview(theirs)).ctypes.data


def test_devices():
    x, other = aligned(), jax.devices()[1]
    moved = dlpack.to_jax(x, device=other)
    assert moved.devices() == {other}
    np.testing.assert_array_equal(np.asarray(moved), x)
    with pytest.raises(ValueError, match="copy=False"):
        dlpack.to_jax(x, device=other, copy=False)


class Elsewhere:
    """A tensor on a device that no JAX knows."""

    device, dtype = "npu:0", "float32"

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **kwargs):
        raise RuntimeError("Unknown backend npu")


def test_what_cannot_be_handed_over():
    with pytest.raises(TypeError, match=r"x must have __dlpack__, .* got list"):
        dlpack.to_jax([1.0])
    with pytest.raises(ValueError, match=r"x is on npu:0, and JAX sees .*: move it, or install JAX for that device"):
        dlpack.to_jax(Elsewhere())
    x = numbers()
    with pytest.raises(TypeError, match=r"x must be a jax.Array with a value \(not inside jit\), got .*Tracer"):
        jax.jit(lambda x: dlpack.from_jax(x, np))(x)
    with pytest.raises(TypeError, match=r"hand over jax.random.key_data"):
        dlpack.from_jax(jax.random.key(0), np)
    with pytest.raises(ValueError, match="numpy does not take int4"):
        dlpack.from_jax(x.astype(jnp.int4), np)
    mesh = Mesh(jax.devices()[:2], ("x",))
    with pytest.raises(ValueError, match="x is spread over 2 devices"):
        dlpack.from_jax(jax.device_put(x, NamedSharding(mesh, PartitionSpec("x"))), np)
    x.delete()
    with pytest.raises(ValueError, match="x was deleted or donated"):
        dlpack.from_jax(x, np)


def test_importing_it_imports_no_framework():
    import subprocess
    import sys

    code = "import sys; import jaxquant.interop.dlpack; print([m for m in ('torch', 'mlx') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
