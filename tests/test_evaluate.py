"""Evaluation on a tiny random decoder: scores against NumPy, and refusal to report what was not compressed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant import evaluate, needles, quantizers
from jaxquant.methods import turboquant
from jaxquant.models.architecture import from_config
from jaxquant.models.decoder import Decoder

DIM, VOCABULARY = 16, 64


@pytest.fixture(scope="module")
def decoder():
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "head_dim": DIM,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "initializer_range": 1.0,
    }  # fmt: skip
    return Decoder(from_config(config), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, VOCABULARY, (3, 33))


def maker(decoder, keys, values, **kwargs):
    return lambda rows: decoder.init_cache(keys, values, batch=rows, capacity=32, **kwargs)


def exact(decoder, dtype="float32"):
    quantizer = quantizers.Exact(dim=DIM, dtype=dtype)
    return maker(decoder, quantizer, quantizer, dtype=dtype)


def packed(decoder, bits=2):
    return maker(decoder, *turboquant.kv(jax.random.key(0), dim=DIM, bits_k=bits, bits_v=bits))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_scores_equal_numpy_on_the_same_logits(decoder, tokens):
    scores = evaluate.compare(decoder, tokens, exact(decoder), packed(decoder), batch=2, chunk=8, stepwise=5)
    fed = jnp.asarray(tokens[:, :-1], jnp.int32)
    plain = np.asarray(decoder(fed)[0], np.float64)
    over_cache, _ = decoder(fed, packed(decoder)(3))
    first, second = log_softmax(plain), log_softmax(np.asarray(over_cache, np.float64))
    following = tokens[:, 1:, None]
    expected = {
        "baseline_nll": -np.take_along_axis(first, following, -1)[..., 0],
        "compressed_nll": -np.take_along_axis(second, following, -1)[..., 0],
        "kl": (np.exp(first) * (first - second)).sum(-1),
    }
    for name, want in expected.items():
        np.testing.assert_allclose(getattr(scores, name), want, atol=2e-4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(scores.compressed_nll, expected["baseline_nll"], atol=2e-4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(scores.kl, (np.exp(second) * (second - first)).sum(-1), atol=2e-4)
    assert scores.baseline_perplexity == pytest.approx(np.exp(expected["baseline_nll"].mean()), rel=1e-4)
    assert scores.compressed_perplexity == pytest.approx(np.exp(expected["compressed_nll"].mean()), rel=1e-4)
    np.testing.assert_array_equal(scores.baseline_hit, first.argmax(-1) == tokens[:, 1:])
    np.testing.assert_array_equal(scores.agreement, first.argmax(-1) == second.argmax(-1))


def test_how_rows_are_fed_does_not_change_the_scores(decoder, tokens):
    one = evaluate.compare(decoder, tokens, exact(decoder), packed(decoder), batch=3, chunk=32, stepwise=0)
    other = evaluate.compare(decoder, tokens, exact(decoder), packed(decoder), batch=1, chunk=8, stepwise=7)
    np.testing.assert_allclose(one.kl, other.kl, atol=1e-4)
    np.testing.assert_allclose(one.compressed_nll, other.compressed_nll, atol=1e-4)


def test_fewer_bits_move_the_logits_more(decoder, tokens):
    divergence = [
        evaluate.compare(decoder, tokens, exact(decoder), packed(decoder, bits), chunk=32).kl.mean()
        for bits in (2, 4, 8)
    ]
    assert divergence[0] > 3 * divergence[1] > 9 * divergence[2] > 0


def test_a_cache_that_does_not_compress_is_refused(decoder, tokens):
    with pytest.raises(RuntimeError, match="compression was not active"):
        evaluate.compare(decoder, tokens, exact(decoder), exact(decoder))
    with pytest.raises(RuntimeError, match="compression was not active"):
        evaluate.compare(decoder, tokens, exact(decoder, "bfloat16"), exact(decoder))


def test_a_cache_that_reads_no_code_is_refused(decoder, tokens, monkeypatch):
    k, v = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=2, bits_v=2)
    wide = quantizers.Exact(dim=DIM, dtype="float32")
    baseline = maker(decoder, wide, wide, dtype="float32")
    windowed = maker(decoder, k, v, window=16, dtype="bfloat16")
    with pytest.raises(RuntimeError, match="keep 16 tokens exact and a row has 16"):
        evaluate.compare(decoder, tokens[:, :17], baseline, windowed)

    monkeypatch.setattr(evaluate, "Exact", turboquant.quantizers.Scalar)
    claims = itertools.cycle((2.0, 1.0))
    monkeypatch.setattr(type(baseline(1)), "bytes_per_token", property(lambda cache: next(claims)))
    with pytest.raises(RuntimeError, match="differ by rounding alone"):
        evaluate.compare(decoder, tokens, baseline, baseline)


def test_a_cache_that_is_too_small_is_refused(decoder, tokens):
    k, v = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=2, bits_v=2)
    with pytest.raises(RuntimeError, match="took 16 of 32 tokens"):
        evaluate.compare(
            decoder, tokens, exact(decoder), lambda rows: decoder.init_cache(k, v, batch=rows, capacity=16)
        )


def test_rows_are_cut_as_documented():
    cut = evaluate.rows(np.arange(100), start=7, count=3, length=10)
    for i, row in enumerate(cut):
        np.testing.assert_array_equal(row, np.arange(100)[7 + i * 11 :][:11])
    with pytest.raises(ValueError, match="tokens holds 100 tokens; start 7 and 9 rows of 10 \\+ 1 need 106"):
        evaluate.rows(np.arange(100), start=7, count=9, length=10)


class Characters:
    """One token a character."""

    def encode(self, text, *, special=True):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("width", [1, 6, 40, 400, 4000])
def test_every_hidden_key_is_marked_as_an_answer_and_can_be_found(width):
    text = ("x" * width + "\n") * max(40, 24_000 // width)
    rows = needles.hide(np.random.default_rng(0), text, Characters(), count=3, length=1500, keys=4)
    assert rows.shape == (3, 1500)
    marked = needles.answers(rows, Characters())
    assert marked.shape == (3, 1499)
    for row, mark in zip(rows, marked, strict=True):
        body = "".join(map(chr, row))
        said = dict(line.removeprefix("The pass key for ").removesuffix(". Remember it.").split(" is ")
                    for line in body.splitlines() if line.startswith("The pass key"))  # fmt: skip
        assert len(said) == 4
        answered = "".join(map(chr, row[1:][mark]))
        names = [line.removeprefix("Question: what is the pass key for ")[:-1]
                 for line in body.splitlines() if line.startswith("Question")]  # fmt: skip
        assert answered == "".join(f" {said[name]}" for name in names)
        assert body.endswith("\n")


class Merging(Characters):
    """Joins a question mark and the newline after it into one token, as many tokenizers do."""

    def encode(self, text, *, special=True):
        return super().encode(text.replace("?\n", "\x01"))

    def decode(self, ids):
        return super().decode(ids).replace("\x01", "?\n")


def test_answers_are_found_whatever_the_tokens_are():
    text = "x = 1\n" * 4000
    rows = needles.hide(np.random.default_rng(0), text, Merging(), count=2, length=1500, keys=3)
    for row, mark in zip(rows, needles.answers(rows, Merging()), strict=True):
        assert [len(key) for key in "".join(map(chr, row[1:][mark])).split(" ")] == [0, 5, 5, 5]


def test_text_without_questions_cannot_be_scored_for_retrieval():
    with pytest.raises(ValueError, match="do not ask for pass keys"):
        needles.answers(np.full((2, 50), ord("x")), Characters())
    with pytest.raises(ValueError, match="keys must be from 1 to 100, got 101"):
        needles.hide(np.random.default_rng(0), "x\n", Characters(), count=1, length=1500, keys=101)
    with pytest.raises(ValueError, match="too short"):
        needles.hide(np.random.default_rng(0), "x\n", Characters(), count=1, length=1500)


def test_retrieval_counts_marked_tokens_only():
    hits = np.array([[True, True, False, False]])
    scores = evaluate.Scores(
        baseline_nll=np.zeros((1, 4)), compressed_nll=np.zeros((1, 4)), kl=np.zeros((1, 4)),
        baseline_hit=hits, compressed_hit=~hits, agreement=hits,
    )  # fmt: skip
    assert scores.retrieval(np.array([[False, True, True, True]])) == pytest.approx((1 / 3, 2 / 3))
    with pytest.raises(ValueError, match="marks no token"):
        scores.retrieval(np.zeros((1, 4), bool))
