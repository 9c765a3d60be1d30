"""`CompressedCache` in whole models: logits beside those over a cache that holds everything and decodes in float64."""

import copy
import warnings

import jax
import numpy as np
import pytest
from interop_oracle import Oracle, pair

torch = pytest.importorskip("torch", reason="needs the extra jaxquant[torch]")
transformers = pytest.importorskip("transformers", reason="needs the extra jaxquant[torch]")

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

from jaxquant import models  # noqa: E402
from jaxquant.interop.torch import CompressedCache  # noqa: E402
from jaxquant.methods import turboquant  # noqa: E402

DIM = 16
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": DIM,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=6)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SIZES, sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=DIM
        )
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def build(name, seed=0):
    torch.manual_seed(seed)
    built = MODELS[name]().eval()
    for parameter in built.parameters():  # large enough that attention matters and no two tokens tie
        torch.nn.init.normal_(parameter, std=0.25)
    built.generation_config.pad_token_id = 0
    return built


class Reference(DynamicLayer):
    """A layer of transformers that keeps all tokens, and gives attention what `Oracle` reads."""

    def __init__(self, sliding, **kept):
        super().__init__()
        self.kept, self.sliding, self.record_past = kept, sliding, False
        self.oracles: list[Oracle] = []
        self.is_sliding = sliding is not None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.oracles:
            padding = self.kept.pop("padding", None) or [0]
            padding = [offset for offset in padding for _ in range(len(key_states) // len(padding))]
            self.oracles = [Oracle(q, sliding=self.sliding, padding=padding, **self.kept) for q in pair()]
        states = zip(self.oracles, (key_states, value_states), strict=True)
        return tuple(
            torch.from_numpy(oracle.append(x.detach().float().numpy(), record=self.record_past)).to(x.dtype)
            for oracle, x in states
        )

    def get_mask_sizes(self, query_length):
        new = query_length if isinstance(query_length, int) else len(query_length)
        seen = self.get_seq_length() if self.sliding is None else min(self.get_seq_length(), self.sliding - 1)
        return seen + new, self.get_seq_length() - seen

    def get_seq_length(self):
        return self.oracles[0].length if self.oracles else 0

    def activate_past_recording(self):
        self.record_past = True

    def crop(self, tokens_to_remove):
        length = self.get_seq_length()
        for oracle in self.oracles:
            oracle.crop(length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove)

    def reorder_cache(self, beam_idx):
        for oracle in self.oracles:
            oracle.take(beam_idx.tolist())


def reference(config, **kept):
    held = DynamicCache(config=config)
    held.layers = [Reference(getattr(layer, "sliding_window", None), **copy.deepcopy(kept)) for layer in held.layers]
    return held


def both(model, **kept):
    return CompressedCache(model.config, *pair(), **kept), reference(model.config, **kept)


def prompt(length=17, rows=1, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 64, (rows, length)))


@torch.no_grad()
def logits(model, ids, held, cuts=(), **kwargs):
    """Read a prompt in chunks."""
    mask, out = kwargs.pop("attention_mask", None), []
    for first, last in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        part = {} if mask is None else {"attention_mask": mask[:, :last]}
        if mask is not None:
            part["position_ids"] = (mask[:, :last].cumsum(1) - 1).clamp(min=0)[:, first:]
        out.append(model(ids[:, first:last], past_key_values=held, **part, **kwargs).logits)
    return torch.cat(out, dim=1)


def assert_close(found, expected, factor=1e-4):
    """Logits of about 10, through two layers whose keys and values differ by rounding."""
    torch.testing.assert_close(found, expected, rtol=0, atol=factor * float(expected.abs().max()))


KEPT = {"codes alone": {}, "sinks and window": {"sinks": 2, "window": 5}}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("cuts", [(), (9,), (4, 5, 6, 7, 16)])
def test_chunks(model, kept, cuts):
    ids = prompt()
    ours, theirs = both(model, **kept)
    found, expected = logits(model, ids, ours, cuts), logits(model, ids, theirs, cuts)
    assert_close(found, expected)
    whole = logits(model, ids, DynamicCache(config=model.config))
    assert (whole - expected).abs().max() > 0.02 * whole.abs().max(), "nothing was compressed"
    if not kept:  # then no cut changes anything
        assert_close(found, logits(model, ids, reference(model.config)))


def test_left_padding(model):
    """Ragged rows, in chunks, one of which is padding alone for a row: every row as if it were the only one."""
    lengths, width = (17, 3, 9), 17
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    rows = [prompt(length, seed=length) for length in lengths]
    for row, (own, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, width - length :], mask[row, width - length :] = own[0], 1
    kept = {"sinks": 2, "window": 4}
    cuts = (6, 12)
    found = logits(model, ids, CompressedCache(model.config, *pair(), **kept, padding=mask), cuts, attention_mask=mask)
    for row, length in enumerate(lengths):
        gap = width - length
        own_cuts = tuple(cut - gap for cut in cuts if cut > gap)
        alone = logits(model, rows[row], reference(model.config, **kept), own_cuts)
        assert_close(found[row, gap:], alone[0])
    blind = logits(model, ids, CompressedCache(model.config, *pair(), **kept), cuts, attention_mask=mask)
    assert_close(blind[0], found[0])
    assert (blind[2] - found[2]).abs().max() > 1e-2, "the sinks of a padded row were padding"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    model = build("llama").to(getattr(torch, dtype))
    ours, theirs = both(model, window=3)
    found, expected = (logits(model, prompt(), held, (9, 10, 11)) for held in (ours, theirs))
    assert_close(found, expected, 0.05)
    exact = logits(model, prompt(), DynamicCache(config=model.config))
    assert (exact - expected).abs().mean() > 2 * (found - expected).abs().mean()


def test_generate(model):
    ids = prompt(rows=2)
    ours, theirs = both(model, sinks=1, window=4)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (model.generate(ids, past_key_values=held, **options) for held in (ours, theirs))
    assert found.sequences.tolist() == expected.sequences.tolist()
    for mine, other in zip(found.logits, expected.logits, strict=True):
        assert_close(mine, other)
    plain = model.generate(ids, **options)
    assert max(float((a - b).abs().max()) for a, b in zip(plain.logits, found.logits, strict=True)) > 0.1


def test_beam_search(model):
    """Beams are reordered with duplicates; rows of different length, and sinks behind the padding."""
    ids, mask = prompt(11, rows=2), torch.ones(2, 11, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    ours, _ = both(model, window=2, sinks=1, padding=mask)
    theirs = reference(model.config, window=2, sinks=1, padding=[0, 4])
    orders, reorder = [], ours.reorder_cache
    ours.reorder_cache = lambda rows: (orders.append(rows.tolist()), reorder(rows))[1]
    options = {
        "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10, "do_sample": False, "attention_mask": mask,
        "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    found, expected = (model.generate(ids, past_key_values=held, **options) for held in (ours, theirs))
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    assert any(len(set(order)) < len(order) for order in orders), "no beam was dropped"


def test_assisted_generation(model):
    """An assistant that is often wrong: rejected drafts are cropped, and the tokens are those without it."""
    assistant = copy.deepcopy(model)
    for parameter in assistant.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ids = prompt()
    options = {"max_new_tokens": 16, "do_sample": False}
    ours, _ = both(model)
    ours.activate_past_recording()
    crops, crop = [], ours.crop
    ours.crop = lambda count: (crops.append(count), crop(count))[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(ids, past_key_values=ours, assistant_model=assistant, **options)
    expected = model.generate(ids, past_key_values=reference(model.config), **options)
    assert found.tolist() == expected.tolist()
    lengths = {layer.get_seq_length() for layer in ours.layers}
    assert any(crops), "no draft was rejected"
    assert lengths == {found.shape[1] - 1}


def test_continuing_after_a_crop(model):
    """A prompt is edited at its end: as if the old end had never been there."""
    ids, other = prompt(12), prompt(12, seed=1)
    ours, _ = both(model)
    ours.activate_past_recording()
    logits(model, ids, ours)
    ours.crop(-5)
    assert ours.get_seq_length() == 7
    found = logits(model, other, ours)
    expected = logits(model, torch.cat([ids[:, :7], other], dim=1), reference(model.config))
    assert_close(found, expected[:, 7:])
    ours.crop(-100)
    assert ours.get_seq_length() == 0
    assert_close(logits(model, other, ours), logits(model, other, reference(model.config)))


def test_a_fork_goes_its_own_way(model):
    ids = prompt(12)
    ours, theirs = both(model, window=3, sinks=2)
    for held in (ours, theirs):
        logits(model, ids, held)
    other = copy.deepcopy(ours)
    logits(model, prompt(5, seed=2), other)
    assert_close(logits(model, prompt(4, seed=3), ours), logits(model, prompt(4, seed=3), theirs))


def test_linear_attention_keeps_its_own_state():
    """Convolution and attention layers in one model."""
    if not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        pytest.skip("in this transformers hybrid models bring caches of their own")
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = transformers.Lfm2Config(
        **{**sizes, "hidden_size": 64}, layer_types=["conv", "full_attention"], block_ff_dim=48, conv_L_cache=3
    )
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    ours = CompressedCache(config, *pair())
    theirs = DynamicCache(config=config)
    theirs.layers[1] = Reference(None)
    found, expected = (logits(model, prompt(), held, (9, 10, 11)) for held in (ours, theirs))
    assert_close(found, expected)
    assert type(ours.layers[0]) is type(theirs.layers[0])
    exact = logits(model, prompt(), DynamicCache(config=config), (9, 10, 11))
    assert (exact - expected).abs().max() > 0.01


def test_the_same_tokens_as_jax():
    """The small model in the package, greedily: the JAX path and torch over the same codes."""
    folder = models.load().folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mine = models.load(dtype=jax.numpy.float32)
    keys, values = turboquant.kv(jax.random.key(0), dim=mine.architecture.dim, bits_k=4, bits_v=2)
    ids = mine.tokenizer.encode("import numpy as np\n\ndef main(")
    held = mine.decoder.init_cache(keys, values, batch=1, capacity=96)
    expected = models.generate(None, mine.decoder, held, [ids], max_tokens=24, chunk=16).tokens[0]
    cache = CompressedCache(model.config, keys, values)
    found = model.generate(
        torch.tensor([ids]),
        past_key_values=cache,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    assert found[: len(expected)] == expected
    plain = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert plain[0, len(ids) :].tolist() != found, "nothing was compressed"
