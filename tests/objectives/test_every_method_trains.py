"""Every method through twenty steps on the embedded world: what it minimises gets smaller, at held-still data."""

import dataclasses
import functools
import importlib.util
import inspect
import pathlib
import re

import jax
import numpy as np
import optax
import pytest

from palign.config.load import load_recipe
from palign.data import world
from palign.data.pack import pack_row, row_shape, stack_rows
from palign.data.tokenize import TokenTree, add_mismatched
from palign.models.transformer import make_language_model
from palign.objectives.base import hyper_defaults
from palign.objectives.compose import make_objective
from palign.objectives.registry import METHODS, needs_of
from palign.sharding.mesh import make_mesh, to_global
from palign.train.build import check_config
from palign.train.state import init_state, state_shardings
from palign.train.step import make_eval_step, make_train_step
from tests.trees import TINY

ROOT = pathlib.Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("palign_config_method", ROOT / "configs" / "method.py")
CONFIG = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(CONFIG)

STEPS, ROWS = 20, 4
# One of each way of feeding a loss in every run; all of them before a release.
KINDS = "sft dpo kto lipo_lambda bradley_terry reverse_kl bco_pair".split()
# What gets better where the loss itself need not fall: weights in front of it change with the policy.
OWN_QUANTITY = {"dft": "sft", "wpo": "dpo"}
# The step size and numbers that fit so short a run; the defaults fit real models.
RATES = {"sppo_hard": 1e-4, "sppo": 1e-4, "gpo": 1e-4, "cal_dpo": 3e-4, "dpop": 3e-4}
REQUIRED = {"beta": 0.1}


@functools.cache
def batch(with_mismatched):
    """Lists of two to four reviews to a prompt, scored by the world's gold reward, as one batch of a few rows."""
    rng = np.random.default_rng(0)
    prompts = world.sample_prompts(rng, 24)
    texts = [[world.sample_response(rng, prompt) for _ in range(2 + i % 3)] for i, prompt in enumerate(prompts)]
    words = sorted(
        {word for prompt, row in zip(prompts, texts, strict=True) for t in (prompt, *row) for word in t.split()}
    )
    ids = {word: i + 2 for i, word in enumerate(words)}
    assert len(words) + 2 <= 256
    encode = lambda text, *end: np.array([*(ids[word] for word in text.split()), *end], np.int32)
    trees = []
    for i, (prompt, row) in enumerate(zip(prompts, texts, strict=True)):
        scores = tuple(np.float32([world.gold_reward(prompt, text) for text in row]).tolist())
        trees.append(TokenTree(encode(prompt), tuple(encode(text, 1) for text in row), scores, i))
    if with_mismatched:
        trees, _ = add_mismatched(trees, max_length=64)
    shape = row_shape(1024, trees=8, responses=5, block=64)
    rows = [pack_row(trees[r::ROWS], shape, "best_worst", "packed", seed=0) for r in range(ROWS)]
    return jax.tree.map(lambda x: np.asarray(x)[None], stack_rows(rows))


def hyper_of(name):
    return {
        key: REQUIRED[key] for key, value in hyper_defaults(METHODS[name]).items() if value is inspect.Parameter.empty
    }


def train(name):
    """The quantity on the batch before and after the steps, by the objective's own evaluation."""
    model = dataclasses.replace(
        TINY, vocab_size=256, value_head=CONFIG.METHODS[name].get("model", {}).get("value_head", 0)
    )
    lm, trunk = make_language_model(model), make_language_model(dataclasses.replace(model, value_head=0))
    mesh, tx = make_mesh(data=1, devices=jax.devices()[:1]), optax.adam(RATES.get(name, 3e-3))
    objective = make_objective(lm, [name], hyper=hyper_of(name), chunk=128)
    measured = make_objective(lm, [OWN_QUANTITY.get(name, name)], hyper=hyper_of(name), chunk=128)
    shardings = state_shardings(mesh, lm, tx, objective.init_carry)
    start = jax.jit(trunk.init)
    models = {
        "reference": start(jax.random.key(0)),
        "teacher": start(jax.random.key(1)),
        "reverse": start(jax.random.key(2)),
    }
    aux = {role: models[role] for role in objective.frozen | measured.frozen}
    places = jax.tree.map(lambda _: shardings.step, aux)
    state = init_state(mesh, lm, tx, seed=0, init_carry=objective.init_carry)
    step = make_train_step(objective, tx, mesh, shardings, {r: places[r] for r in objective.frozen})
    evaluate = make_eval_step(measured, mesh, shardings.params, {r: places[r] for r in measured.frozen})
    given = to_global(mesh, batch(METHODS[name].mismatched))
    quantity = f"loss/{OWN_QUANTITY.get(name, name)}"

    def value(state):
        carry = state.carry if measured.init_carry() else {}
        mean = evaluate(state.params, carry, {r: aux[r] for r in measured.frozen}, given)[quantity]
        assert mean.count > 0
        return float(mean.sum / mean.count)

    before = value(state)
    for _ in range(STEPS):
        state, metrics = step(state, {r: aux[r] for r in objective.frozen}, given)
        assert metrics["nonfinite"].sum == 0
    return before, value(state)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.slow) for n in METHODS])
def test_twenty_steps_make_it_better(name):
    before, after = train(name)
    assert after < before - 1e-4 * abs(before), (before, after)


def test_the_registry_the_configs_and_the_docs_list_the_same_names():
    assert list(CONFIG.METHODS) == list(METHODS)
    page = (ROOT / "docs" / "methods.md").read_text()
    listed = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert set(METHODS) <= listed, set(METHODS) - listed


@pytest.mark.parametrize("name", METHODS)
def test_the_config_of_every_method_resolves_and_names_what_it_reads(name):
    stages = load_recipe(f"{ROOT / 'configs' / 'method.py'}:{name}").stages
    for config in stages.values():
        check_config(config)
    last = list(stages.values())[-1]
    assert last.objective.loss_type == (name,) and set(last.sources) >= needs_of([name]).frozen
