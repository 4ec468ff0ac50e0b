"""The step of LoRA factors: it starts at the base to the last bit, on any mesh, and computes nothing of the base's."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest

from palign.config.schema import LoraConfig
from palign.models.lora import add_lora
from palign.models.transformer import make_language_model
from palign.objectives.compose import make_objective
from palign.objectives.lora import BASE, with_base
from palign.sharding.mesh import make_mesh, to_global
from palign.sharding.rules import parameter_shardings
from palign.train.state import new_state, state_shardings
from palign.train.step import make_train_step
from tests.compiled import shapes_in, uncached
from tests.trees import TINY, largest_difference, make_batch, random_trees

MODEL = dataclasses.replace(TINY, vocab_size=500, tie_embedding=False, remat="full")
LORA = LoraConfig(rank=3, alpha=6.0)
TX = optax.sgd(0.1, momentum=0.9)  # its momentum after one step is the gradient
ROWS = 16


@functools.cache
def program(loss_type="dpo", data=1, fsdp=1, dtype="float32"):
    """`(compiled step, places of the state, of the base, mesh)`."""
    lm = make_language_model(dataclasses.replace(MODEL, dtype=dtype))
    mesh, trained = make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp]), add_lora(lm, LORA)
    whole = make_objective(lm, [loss_type], hyper={"beta": 0.1} if loss_type == "dpo" else {}, chunk=32)
    objective = with_base(whole, LORA, whole.frozen)
    shardings = state_shardings(mesh, trained, TX)
    places = {BASE: parameter_shardings(mesh, jax.eval_shape(lm.init, jax.random.key(0)))}
    return make_train_step(objective, TX, mesh, shardings, places), shardings, places, mesh


@functools.cache
def weights():
    """A base with confident predictions, and factors of which none is 0."""
    lm = make_language_model(MODEL)
    base = jax.tree.map(np.asarray, jax.jit(lm.init)(jax.random.key(0)))
    base["unembedding"] = 20 * base["unembedding"]
    shapes, rng = jax.eval_shape(add_lora(lm, LORA).init, jax.random.key(0)), np.random.default_rng(0)
    return base, jax.tree.map(lambda s: 0.2 * rng.normal(size=s.shape).astype(np.float32), shapes)


def batch(mesh, num=24):
    used = min(num, 13)
    rows = make_batch(random_trees(0, num, responses=(2, 4)), rows=ROWS, used=used, responses=4)
    return to_global(mesh, jax.tree.map(lambda x: np.asarray(x)[None], rows))


def run(factors, num=24, **where):
    step, shardings, places, mesh = program(**where)
    state = jax.device_put(new_state(factors, TX), shardings)
    return jax.device_get(step(state, jax.device_put({BASE: weights()[0]}, places), batch(mesh, num)))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_one_pair_starts_at_log_2_to_the_last_bit_and_all_pairs_at_rewards_of_0(dtype):
    start = jax.device_get(jax.jit(add_lora(make_language_model(MODEL), LORA).init)(jax.random.key(3)))
    for num in (1, 24):
        state, metrics = run(start, num, dtype=dtype)
        assert all(metrics[name].sum == 0 for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"))
        gradients = jax.tree_util.tree_leaves_with_path(state.opt_state[0].trace)
        for path, gradient in gradients:  # A's is 0 as long as B is
            assert (np.abs(gradient).max() > 0) == (path[-1].key == "lora_b"), path
        if num == 1:
            assert metrics["rewards/margins"].count == 1 and metrics["loss"].sum == np.float32(math.log(2))


@pytest.mark.slow
def test_a_mesh_gives_the_same_update():
    expected, metrics = run(weights()[1])
    with uncached():
        state, on_mesh = run(weights()[1], data=2, fsdp=4)
    assert abs(metrics["loss"].sum - math.log(2)) > 1e-3
    np.testing.assert_allclose(on_mesh["loss"].sum, metrics["loss"].sum, rtol=1e-6)
    assert largest_difference(state.opt_state, expected.opt_state) < 1e-5


@pytest.mark.parametrize("loss_type", ["dpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_no_gradient_of_a_frozen_kernel_is_computed(loss_type):
    """Products of the shape of the unembedding or of a layer's kernel; nobody asks for them, so XLA leaves them out."""
    step, _, _, mesh = program(loss_type)
    base, factors = weights()
    with jax.set_mesh(mesh):
        compiled = step.compiled.lower(new_state(factors, TX), {BASE: base}, batch(mesh)).compile()
    products = {shape for line in compiled.as_text().splitlines() if " dot(" in line for shape in shapes_in(line)[:1]}
    kernels = {(16, 512), (512, 16), (16, 24), (24, 16)}
    assert (3, 24) in products and not products & kernels, products
