"""Property-test a quantizer of your own with hypothesis: what must hold for every shape and every number.

    python examples/property_test.py                       # needs hypothesis
    python -m pytest examples/property_test.py

`JAXQUANT_CONTRACT=package.module python -m pytest tests/test_methods.py`, in a clone, asks for more: compilation, scan,
citations. This is what to write for what is special about yours: here, that a dithered code errs by less than a step,
whatever it is given. `test_a_broken_quantizer_is_noticed` shows that the tests can fail.
"""

import dataclasses

import dithered
import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxquant import quantizers

DIM = 16
QUANTIZER = dithered.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=4)[0]

finite = st.floats(-(2.0**60), 2.0**60, width=32)
vectors = arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.just(DIM)), elements=finite)
anything = arrays.arrays(np.uint16, st.tuples(st.integers(0, 5), st.just(DIM))).map(lambda bits: bits.view(np.float16))


def errs_by_less_than_a_step(x: np.ndarray, *, decoder: dithered.Dithered = QUANTIZER) -> bool:
    code = quantizers.quantize(QUANTIZER, x)
    steps = np.asarray(code.scales, np.float32)[:, None]
    subnormal = 8 * 2.0**-25  # below 2**-14, a step of float16 is off by up to 2**-25, and a level is up to 8 steps
    inside = np.abs(x) < 60_000  # beyond float16, scales are clamped
    error = np.abs(np.asarray(quantizers.dequantize(decoder, code)) - x)
    return bool(np.all((error <= 1.01 * steps + subnormal + 1e-6 * np.abs(x))[inside]))


@settings(max_examples=50, deadline=None)
@given(vectors)
def test_the_error_is_less_than_a_step(x: np.ndarray) -> None:
    assert errs_by_less_than_a_step(x)


@settings(max_examples=50, deadline=None)
@given(anything)
def test_nothing_that_comes_in_makes_nan_come_out(x: np.ndarray) -> None:
    code = quantizers.quantize(QUANTIZER, x)
    assert code.codes.dtype == np.uint8
    assert code.nbytes == len(x) * (DIM * 4 // 8 + 2), "bytes as promised"
    assert np.isfinite(np.asarray(quantizers.dequantize(QUANTIZER, code))).all()


def test_a_broken_quantizer_is_noticed() -> None:
    broken = dataclasses.replace(QUANTIZER, dither=-QUANTIZER.dither)  # a flipped sign
    assert not errs_by_less_than_a_step(
        np.random.default_rng(0).normal(size=(64, DIM)).astype(np.float32), decoder=broken
    )


if __name__ == "__main__":
    test_the_error_is_less_than_a_step()
    test_nothing_that_comes_in_makes_nan_come_out()
    test_a_broken_quantizer_is_noticed()
    print("100 examples passed, and the broken quantizer was noticed")
