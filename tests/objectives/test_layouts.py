"""Packed, unpacked and unshared batches are the same batch (T8), for every objective."""

import functools
import inspect

import jax
import numpy as np
import pytest

from palign.objectives.base import hyper_defaults
from palign.objectives.compose import make_objective
from palign.objectives.registry import METHODS
from tests.trees import evaluate_objective, largest_difference, make_batch, random_trees, tiny_model

REQUIRED = {"beta": 0.1}
TREES = random_trees(0, 6)


def objective_of(*names, **kwargs):
    lm, *_ = tiny_model()
    needed = {
        k: REQUIRED[k]
        for name in names
        for k, v in hyper_defaults(METHODS[name]).items()
        if v is inspect.Parameter.empty
    }
    return make_objective(lm, names, hyper=needed, chunk=16, **kwargs)


def compile_loss(objective):
    """`batch -> (loss, gradient, metrics)`, compiled once for the one shape that the tests use."""
    _, params, other = tiny_model()
    aux = {"reference": other, "teacher": other, "reverse": jax.tree.map(lambda x: 0.9 * x, other)}
    aux = {role: aux[role] for role in objective.frozen}

    compiled = jax.jit(jax.value_and_grad(functools.partial(evaluate_objective, objective), has_aux=True))

    def run(batch):
        (value, metrics), gradient = compiled(params, aux, batch)
        return value, gradient, {name: mean.sum / mean.count for name, mean in metrics.items()}

    return run


# One of each way of feeding a loss in every run; all of them before a release.
KINDS = "sft dpo simpo ld_dpo tdpo2 wpo aot_unpaired bco apo_zero_unpaired lipo_lambda sppo aligndistil".split()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in METHODS]
)
def test_packed_unshared_and_padded_batches_agree(name):
    run = compile_loss(objective_of(name))
    packed = run(make_batch(TREES, used=2))
    assert np.isfinite(packed[0]) and packed[0] != 0
    others = {
        "one row less": make_batch(TREES, used=3),
        "one tree a row": make_batch(TREES),
        "unshared, one a row": make_batch(TREES, layout="unshared"),
    }
    for label, batch in others.items():
        value, gradient, metrics = run(batch)
        np.testing.assert_allclose(value, packed[0], rtol=1e-6, err_msg=label)
        assert largest_difference(gradient, packed[1]) < 1e-5, label
        for key, metric in metrics.items():
            np.testing.assert_allclose(metric, packed[2][key], rtol=2e-5, atol=1e-6, err_msg=f"{label}: {key}")
