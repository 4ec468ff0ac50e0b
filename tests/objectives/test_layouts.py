"""Packed, unpacked and unshared batches are the same batch (T8), for every objective."""

import functools
import inspect

import jax
import numpy as np
import pytest

from palign.models.value_head import add_value_head, new_value_head
from palign.objectives.base import hyper_defaults
from palign.objectives.compose import make_objective
from palign.objectives.registry import METHODS
from tests.trees import TINY, evaluate_objective, largest_difference, make_batch, random_trees, tiny_model

REQUIRED = {"beta": 0.1}
TREES = random_trees(0, 6)


def models_of(name):
    """The model, its parameters and those of a frozen model not far from it."""
    lm, params, other = tiny_model()
    near = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, params, other)
    if not METHODS[name].all_needs.values:
        return lm, params, near
    width = 2 if name == "gpm" else 1
    head = new_value_head(jax.random.key(2), width, TINY.dim)
    return add_value_head(lm, width, TINY.dim), params | {"value_head": head}, near


def objective_of(lm, *names, **kwargs):
    needed = {
        k: REQUIRED[k]
        for name in names
        for k, v in hyper_defaults(METHODS[name]).items()
        if v is inspect.Parameter.empty
    }
    return make_objective(lm, names, hyper=needed, chunk=16, **kwargs)


def compile_loss(name):
    """`batch -> (loss, gradient, metrics)`, compiled once for the one shape that the tests use."""
    lm, params, other = models_of(name)
    objective = objective_of(lm, name)
    aux = {"reference": other, "teacher": other, "reverse": jax.tree.map(lambda x: 0.9 * x, other)}
    aux = {role: aux[role] for role in objective.frozen}

    compiled = jax.jit(jax.value_and_grad(functools.partial(evaluate_objective, objective), has_aux=True))

    def run(batch):
        (value, metrics), gradient = compiled(params, aux, batch)
        return value, gradient, {name: mean.sum / mean.count for name, mean in metrics.items()}

    return run


# One of each way of feeding a loss in every run; all of them before a release.
KINDS = "sft dpo simpo ld_dpo tdpo2 wpo aot_unpaired bco apo_zero_unpaired lipo_lambda sppo aligndistil".split()


# Their relative error is the absolute one of a log-ratio, here the difference of two sums near 50 nats (1 ulp = 4e-6).
EXPONENTIAL = ("f_dpo_forward_kl", "f_dpo_alpha")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in METHODS]
)
def test_packed_unshared_and_padded_batches_agree(name):
    run = compile_loss(name)
    packed = run(make_batch(TREES, used=2))
    assert np.isfinite(packed[0]) and packed[0] != 0
    others = {
        "one row less": make_batch(TREES, used=3),
        "one tree a row": make_batch(TREES),
        "unshared, one a row": make_batch(TREES, layout="unshared"),
    }
    for label, batch in others.items():
        value, gradient, metrics = run(batch)
        np.testing.assert_allclose(value, packed[0], rtol=1e-5 if name in EXPONENTIAL else 1e-6, err_msg=label)
        assert largest_difference(gradient, packed[1]) < 1e-5, label
        for key, metric in metrics.items():
            np.testing.assert_allclose(metric, packed[2][key], rtol=2e-5, atol=1e-6, err_msg=f"{label}: {key}")
