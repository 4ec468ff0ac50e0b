"""LoRA factors: the same function as merged kernels, in value and gradient; at the start the base itself."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from palign.config.schema import LoraConfig
from palign.models.lora import add_lora, attach, merge
from palign.models.transformer import make_language_model
from palign.objectives.compose import make_objective
from palign.objectives.lora import BASE, with_base
from tests.trees import TINY, evaluate_objective, largest_difference, make_batch, random_trees

LORA = LoraConfig(rank=3, alpha=6.0)
HYPER = {"beta": 0.1}
# Widths that no two axes share, a vocabulary of its own, biases and norms on queries and keys.
MODEL = dataclasses.replace(TINY, attention_bias=True, qk_norm=True, tie_embedding=False, vocab_size=90)


@functools.cache
def model():
    lm = make_language_model(MODEL)
    return lm, jax.tree.map(np.asarray, jax.jit(lm.init)(jax.random.key(0)))


def factors(config=LORA, *, lm=None, seed=1):
    """Factors of which none is 0."""
    fresh = jax.jit(add_lora(lm or model()[0], config).init)(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), fresh)


@functools.cache
def objective(loss_type="dpo"):
    lm = model()[0]
    return make_objective(lm, [loss_type], hyper=HYPER, chunk=16)


@functools.cache
def rows():
    return jax.tree.map(np.asarray, make_batch(random_trees(0, 10, responses=(2, 4)), rows=4, used=4, responses=4))


def test_a_product_in_numpy_is_what_is_added_to_every_kernel():
    _, base = model()
    small = factors()
    merged = merge(base, small, LORA)
    axes = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
    for part, names in (("attention", ("query", "key", "value", "output")), ("mlp", ("gate", "up", "down"))):
        for name in names:
            own = small["layers"][part][name]
            for layer in range(MODEL.num_layers):
                a, b = (own[x][layer].astype(np.float64) for x in ("lora_a", "lora_b"))
                product = np.tensordot(a, b, axes=1)
                assert a.ndim == axes[name] + 1
                kernel = base["layers"][part][name]["kernel"][layer]
                expected = kernel + 2.0 * product
                np.testing.assert_allclose(
                    merged["layers"][part][name]["kernel"][layer], expected, rtol=1e-5, atol=1e-6
                )
    untouched = [merged["embedding"], merged["layers"]["attention"]["query"]["bias"]]
    for x, y in zip(untouched, [base["embedding"], base["layers"]["attention"]["query"]["bias"]], strict=True):
        np.testing.assert_array_equal(x, y)
    assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_factors_beside_kernels_are_the_merged_model_in_loss_and_gradient():
    _, base = model()
    small = factors()
    adapted = with_base(objective(), LORA)

    @jax.jit
    def beside(small, base, batch):
        aux = {BASE: base, "reference": base}
        return jax.value_and_grad(lambda f: evaluate_objective(adapted, f, aux, batch)[0])(small)

    @jax.jit
    def through_kernels(small, base, batch):
        def loss(small):
            return evaluate_objective(objective(), merge(base, small, LORA), {"reference": base}, batch)[0]

        return jax.value_and_grad(loss)(small)

    (loss, gradient), (expected, wanted) = beside(small, base, rows()), through_kernels(small, base, rows())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert abs(float(expected) - math.log(2)) > 1e-3
    assert largest_difference(gradient, wanted) < 1e-5


def test_only_the_kernels_that_are_named_get_factors_and_the_base_gets_no_gradient():
    lm, base = model()
    few = LoraConfig(rank=2, targets=("query", "down"))
    shapes = jax.eval_shape(add_lora(lm, few).init, jax.random.key(0))
    assert {part: set(own) for part, own in shapes["layers"].items()} == {"attention": {"query"}, "mlp": {"down"}}
    assert shapes["layers"]["mlp"]["down"]["lora_a"].shape == (2, 24, 2)
    gradient = jax.grad(lambda base: sum(jnp.sum(x) for x in jax.tree.leaves(attach(base, factors(few), few))))(base)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradient))
