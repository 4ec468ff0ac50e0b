"""The transformer against a float64 NumPy decoder, and what must not depend on how it is run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.config.schema import ModelConfig, RopeScaling
from palign.data.tokenize import TokenTree
from palign.heads.target_values import target_logps
from palign.heads.targets import finish_logits
from palign.models.config import LayerTables, compute_dtype, layer_tables, padded_vocabulary
from palign.models.layers import product
from palign.models.transformer import make_language_model
from palign.objectives.base import sum_by_slot
from tests.models import numpy_decoder
from tests.trees import TINY, VOCAB, largest_difference, make_batch, random_trees

LLAMA3 = RopeScaling(factor=8.0, original_length=64, low_frequency_factor=1.0, high_frequency_factor=4.0)
OPTIONS = {
    "norm_offset": dict(norm_offset=1.0),
    "norm_epsilon": dict(norm_epsilon=0.1),
    "four norms": dict(norms_per_layer=4),
    "qk_norm": dict(qk_norm=True),
    "attention_bias": dict(attention_bias=True),
    "windows": dict(windows=(3, 0)),
    "rope_bases": dict(rope_bases=(10000.0, 100.0)),
    "linear rope scaling": dict(rope_scalings=(RopeScaling(factor=4.0),)),
    "llama 3 rope scaling": dict(rope_scalings=(LLAMA3, RopeScaling())),
    "query_scale": dict(query_scale=0.9),
    "attention_softcap": dict(attention_softcap=0.5),
    "final_softcap": dict(final_softcap=2.0),
    "embedding_scale": dict(embedding_scale=4.0),
    "gelu_tanh": dict(activation="gelu_tanh"),
    "untied": dict(tie_embedding=False),
    "head_dim": dict(head_dim=6),
    "one key head": dict(num_key_heads=1),
    "as many key heads": dict(num_key_heads=4),
    "gemma": dict(
        norm_offset=1.0, norms_per_layer=4, activation="gelu_tanh", windows=(4, 0), embedding_scale=4.0,
        query_scale=0.3, attention_softcap=5.0, final_softcap=3.0, rope_bases=(10000.0, 1e6), head_dim=8, qk_norm=True,
    ),
    "qwen": dict(attention_bias=True, qk_norm=True, tie_embedding=False, rope_bases=(1e6,), rope_scalings=(LLAMA3,)),
    "rest": dict(
        norm_offset=0.5, norm_epsilon=0.1, rope_bases=(10000.0, 100.0), rope_scalings=(RopeScaling(factor=4.0),),
        num_key_heads=1, windows=(3, 0), query_scale=0.9, tie_embedding=False, final_softcap=2.0, embedding_scale=0.5,
    ),
}  # fmt: skip
COMBINED = ("gemma", "qwen", "rest")  # hold every option between them


@functools.cache
def batch():
    return make_batch(random_trees(0, 5), rows=2, used=2, tokens=96)


def config_of(**options):
    return dataclasses.replace(TINY, **options)


@functools.cache
def random_params(config):
    """Parameters of which none is 0 or 1: biases and norm scales count too."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make_language_model(config).init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.1 + 0.6 * rng.normal(size=s.shape), s.dtype), shapes)


@functools.cache
def run(config):
    """`(hidden, logits)` of the batch."""
    lm = make_language_model(config)

    @jax.jit
    def both(params, batch):
        hidden = lm.hidden(params, batch)
        kernel, softcap, vocab_size = lm.unembed(params)
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32).reshape(-1, kernel.shape[1])
        return hidden, finish_logits(logits, softcap, vocab_size).reshape(*hidden.shape[:2], -1)[..., :vocab_size]

    return jax.tree.map(np.asarray, both(random_params(config), batch()))


@functools.cache
def expected(config):
    """The same by the NumPy decoder, rows stacked."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params(config))
    ids = [np.asarray(x) for x in (batch().token, batch().position, batch().group, batch().branch)]
    made = [numpy_decoder.forward(config, params, *row) for row in zip(*ids, strict=True)]
    return [np.stack(x) for x in zip(*made, strict=True)]


def real(array):
    return array[np.asarray(batch().group) > 0]


SINGLE = [pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS if name not in COMBINED]


@pytest.mark.parametrize("name", ["plain", *COMBINED, *SINGLE])
def test_every_option_is_computed_as_in_plain_float64(name):
    config = config_of(**OPTIONS.get(name, {}))
    for got, wanted in zip(run(config), expected(config), strict=True):
        assert np.isfinite(got).all()
        assert np.abs(real(got) - real(wanted)).max() < 1e-5 * np.abs(real(wanted)).max()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_an_effect(name):
    if name in ("untied", "head_dim", "one key head", "as many key heads", "attention_bias", "qk_norm", "four norms"):
        plain, changed = (jax.tree.structure(random_params(c)) for c in (TINY, config_of(**OPTIONS[name])))
        shapes = [[x.shape for x in jax.tree.leaves(random_params(c))] for c in (TINY, config_of(**OPTIONS[name]))]
        assert plain != changed or shapes[0] != shapes[1]
        return
    logits, changed = expected(TINY)[1], expected(config_of(**OPTIONS[name]))[1]
    assert np.abs(real(logits) - real(changed)).max() > 1e-3 * np.abs(real(logits)).max()


@functools.cache
def compile_gradient(config):
    lm = make_language_model(config)

    def loss(params, batch):
        hidden = lm.hidden(params, batch)
        return jnp.sum(target_logps(hidden, lm.unembed(params), batch, chunk=32)), hidden

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    "options",
    [dict(scan_layers=False, remat="full"), dict(remat="full"), dict(remat="dots"), dict(remat="attention")],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_way_over_the_layers_changes_neither_values_nor_gradients(options):
    config = config_of(**OPTIONS["gemma"])
    params = random_params(config)
    (value, hidden), gradient = compile_gradient(config)(params, batch())
    (other_value, other_hidden), other = compile_gradient(dataclasses.replace(config, **options))(params, batch())
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    assert largest_difference(real(other_hidden), real(hidden)) < 1e-6
    assert largest_difference(other, gradient) < 1e-5


def test_what_is_kept_is_not_computed_again_and_costs_memory():
    """A loop of attention forward, one backward; one more where the forward is taken again."""
    loops, kept = {}, {}
    for remat in ("none", "dots", "attention", "full"):
        config = config_of(remat=remat, num_layers=8, hidden_dim=64)
        params = jax.eval_shape(make_language_model(config).init, jax.random.key(0))
        lowered = compile_gradient(config).lower(params, batch())
        loops[remat] = lowered.as_text().count("stablehlo.while")
        kept[remat] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert loops["none"] == loops["dots"] == loops["attention"] == loops["full"] - 1
    assert kept["none"] > kept["dots"] > kept["attention"] > kept["full"]


def test_scanned_and_unrolled_layers_start_from_the_same_parameters():
    key = jax.random.key(3)
    configs = (config_of(scan_layers=scan, norm_offset=1.0) for scan in (True, False))
    scanned, unrolled = (jax.jit(make_language_model(config).init)(key) for config in configs)
    jax.tree.map(np.testing.assert_array_equal, scanned, unrolled)
    kernels = scanned["layers"]["mlp"]["gate"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    assert (np.asarray(scanned["final_norm"]["scale"]) == 0).all()  # an identity: the offset is 1


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    config = config_of(dtype="bfloat16")
    hidden, logits = run(config)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves(random_params(config))} == {jnp.dtype(jnp.float32)}
    wanted = expected(TINY)[1]
    assert np.abs(real(logits) - real(wanted)).max() < 0.05 * np.abs(real(wanted)).max()


def test_parameters_can_be_bfloat16():
    shapes = jax.eval_shape(make_language_model(config_of(param_dtype="bfloat16")).init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


# Who sees whom. Every branch has tokens of its own, so a row of the embedding's gradient is one branch's.
PROMPT, BRANCHES = np.arange(3, 10, dtype=np.int32), ([10, 11, 12], [13], [14, 15, 16, 17])
TREE = TokenTree(PROMPT, tuple(np.array(b, np.int32) for b in BRANCHES), (2.0, 1.0, 0.0), 0)
OTHER = TokenTree(np.arange(20, 25, dtype=np.int32), (np.array([25, 26], np.int32),), (0.0,), 1)
UNTIED = config_of(tie_embedding=False, attention_bias=True, windows=(4, 0))


@functools.cache
def one_row():
    return make_batch([TREE, OTHER], rows=1, used=1, tokens=32, block=8)


@functools.cache
def compiled_hidden():
    return jax.jit(make_language_model(UNTIED).hidden)


@pytest.mark.parametrize(
    "column", [8, 9, 10, 12, 20]
)  # a middle and a last token, a branch of one, the last, another tree
def test_a_changed_token_changes_only_what_may_see_it_and_that_bitwise(column):
    batch = one_row()
    group, branch, position = (np.asarray(x)[0] for x in (batch.group, batch.branch, batch.position))
    before, after = (
        np.asarray(compiled_hidden()(random_params(UNTIED), b))[0]
        for b in (batch, batch._replace(token=batch.token.at[0, column].set(40)))
    )
    sees = (group == group[column]) & (position >= position[column])
    sees &= (branch[column] == 0) | (branch == branch[column])
    changed = (before != after).any(axis=-1)
    real = group > 0
    np.testing.assert_array_equal(changed[real], sees[real])


@functools.cache
def compiled_branch_gradient():
    """`(params, batch, k) -> d log p(response k) / d embedding`."""
    lm = make_language_model(UNTIED)

    def logp(params, batch, k):
        by_slot = sum_by_slot(target_logps(lm.hidden(params, batch), lm.unembed(params), batch, chunk=8), batch)
        return jnp.take(by_slot[0], k)

    return jax.jit(lambda *arguments: jax.grad(logp)(*arguments)["embedding"])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_branch_learns_from_another_branchs_tokens(k):
    gradient = compiled_branch_gradient()(random_params(UNTIED), one_row(), k)
    rows = (np.asarray(gradient) != 0).any(axis=1)
    own = BRANCHES[k - 1][:-1]  # nothing is predicted from the last token
    assert set(np.flatnonzero(rows)) == {*PROMPT.tolist(), *own}


# Decoding.
DECODE = config_of(
    windows=(3, 0), attention_softcap=4.0, attention_bias=True, rope_bases=(10000.0, 100.0), rope_scalings=(LLAMA3,)
)


@pytest.mark.parametrize("config", [DECODE, config_of(**OPTIONS["gemma"])], ids=["windows", "gemma"])
def test_decoding_equals_full_recomputation_for_ragged_prompts_and_several_samples(config):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, VOCAB, n).astype(np.int32)
    B, K, N, P = 3, 2, 4, 70  # the longest prompt is more than one block
    trees = [TokenTree(draw(n), tuple(draw(N) for _ in range(K)), (1.0, 0.0), i) for i, n in enumerate((1, 6, P))]
    lm, params = make_language_model(config), random_params(config)
    full = np.asarray(jax.jit(lm.hidden)(params, make_batch(trees, rows=B, used=B, tokens=96, block=16)))
    length = np.array([tree.prompt.size for tree in trees])
    prompts = np.full((B, P), 2, np.int32)  # what pads a prompt is an ordinary token
    for prompt, tree in zip(prompts, trees, strict=True):
        prompt[: tree.prompt.size] = tree.prompt
    prefill = jax.jit(functools.partial(lm.prefill, samples=K, capacity=N + 3))
    last, cache = prefill(params, prompts, jnp.asarray(length))
    limit = 1e-5 * np.abs(full).max()
    np.testing.assert_allclose(last, full[np.arange(B), length - 1], rtol=0, atol=limit)
    step = jax.jit(lm.decode_step)
    for n in range(N):
        token = np.array([[response[n] for response in tree.responses] for tree in trees])
        hidden, cache = step(params, cache, jnp.asarray(token))
        columns = length[:, None] + N * np.arange(K) + n
        np.testing.assert_allclose(hidden, full[np.arange(B)[:, None], columns], rtol=0, atol=limit)
    assert cache.key.shape == (config.num_layers, B, K, config.num_key_heads, N + 3, config.head_width)
    assert step._cache_size() == 1


@pytest.mark.parametrize("equation", ["rtd,dhe->rthe", "rthe,hed->rtd", "rtd,df->rtf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_einsum_in_value_and_gradient(equation, dtype):
    sizes, rng = dict(r=2, t=3, d=4, h=5, e=6, f=7), np.random.default_rng(0)
    x, kernel, cotangent = (
        jnp.asarray(rng.normal(size=[sizes[letter] for letter in letters]), dtype)
        for letters in equation.replace("->", ",").split(",")
    )
    value, pull = jax.vjp(functools.partial(product, equation), x, kernel)
    wanted, pull_wanted = jax.vjp(functools.partial(jnp.einsum, equation), x, kernel)
    for got, expected in zip((value, *pull(cotangent)), (wanted, *pull_wanted(cotangent)), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        got, expected = (np.asarray(array.astype(jnp.float32)) for array in (got, expected))
        assert np.abs(got - expected).max() < float(jnp.finfo(dtype).eps) * 4 * np.abs(expected).max()


# The tables that follow from a config.
def test_patterns_repeat_over_the_layers():
    config = config_of(num_layers=5, windows=(8, 8, 0), rope_bases=(1e4, 1e6))
    tables, frequencies = layer_tables(config)
    assert isinstance(tables, LayerTables)
    assert tables.window[[0, 1, 3, 4]].tolist() == [8, 8, 8, 8] and tables.window[2] > 1e8
    assert len(frequencies) == 2 and len(set(tables.rotary[[0, 2, 4]])) == len(set(tables.rotary[[1, 3]])) == 1
    assert frequencies[tables.rotary[1]][1] < frequencies[tables.rotary[0]][1]


def test_rotary_scaling_is_llama_3s_formula():
    scaling = RopeScaling(factor=8.0, original_length=8192, low_frequency_factor=1.0, high_frequency_factor=4.0)
    config = ModelConfig(dim=128, num_heads=1, num_key_heads=1, rope_bases=(500000.0,), rope_scalings=(scaling,))
    wanted = numpy_decoder.frequencies(config, 0)
    np.testing.assert_allclose(layer_tables(config)[1], wanted[None], rtol=1e-6)
    plain = numpy_decoder.frequencies(dataclasses.replace(config, rope_scalings=(RopeScaling(),)), 0)
    ratio = plain / wanted
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8) and ((ratio > 1.01) & (ratio < 7.9)).any()


def test_the_vocabulary_is_padded_and_the_unembedding_knows_its_size():
    assert padded_vocabulary(TINY) == 64
    assert padded_vocabulary(config_of(vocab_size=64)) == 64
    assert padded_vocabulary(config_of(vocab_multiple=1)) == VOCAB
    unembedding = make_language_model(TINY).unembed(random_params(TINY))
    assert unembedding.kernel.shape == (16, 64) and unembedding.vocab_size == VOCAB


def test_auto_computes_in_float32_on_a_cpu():
    assert compute_dtype(config_of(dtype="auto")) == jnp.float32
    assert compute_dtype(config_of(dtype="bfloat16")) == jnp.bfloat16


def test_a_model_without_a_vocabulary_is_an_error():
    with pytest.raises(ValueError, match=r"config.model.vocab_size: must be set"):
        make_language_model(ModelConfig())
