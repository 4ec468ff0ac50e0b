"""The listwise losses against RAX's ranking losses, which LiPO was built on, for the same scores and masks.

`make_rax_fixture.py` recorded RAX's side, summed over each list. Two definitions differ by a factor: RAX's
`dcg_lambdaweight` has log2 in its discount and multiplies by the padded length K, and its `pairwise_mse_loss` counts
every pair twice, and each response with itself.
"""

import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from palign import losses

LENGTHS = (2, 5, 8)
BETA = 0.25  # a power of 2: scores / BETA * BETA are the recorded scores to the last bit

# RAX's name -> ours, the labels that it is given.
SAME = {
    "softmax": (losses.lipo_softmax, "labels"),
    "softmax_of_labels": (losses.listnet, "labels"),
    "pairwise_logistic": (losses.lipo_pair_logistic, "labels"),
    "pairwise_hinge": (losses.lipo_pair_hinge, "labels"),
    "pointwise_sigmoid": (losses.lipo_pointwise_sigmoid, "labels"),
    "pointwise_mse": (losses.lipo_pointwise_mse, "labels"),
    "listmle": (losses.plackett_luce, "ranking"),
}


@functools.cache
def recorded():
    with np.load(pathlib.Path(__file__).parent / "rax_values.npz") as file:
        return dict(file)


def of_length(length):
    """Name -> array, of the lists of one length."""
    prefix = f"{length}/"
    return {name.removeprefix(prefix): array for name, array in recorded().items() if name.startswith(prefix)}


def ours(loss, record, labels="labels"):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        scores = record["scores"]
        policy, reference = scores / BETA, np.zeros_like(scores)
        return np.asarray(loss(policy, reference, record[labels], record["valid"], beta=BETA))


def same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_fixture_says_what_made_it_and_has_padding_and_ties():
    provenance = json.loads(str(recorded()["provenance"]))
    assert provenance["rax"] == "0.4.0" and tuple(provenance["lengths"]) == LENGTHS
    for length in LENGTHS:
        valid = of_length(length)["valid"]
        assert valid.any(-1).all() and valid.all(-1).any() and not valid.all()
    assert any(len(set(row)) < 8 for row in of_length(8)["labels"].tolist())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SAME)
def test_the_loss_is_rax_s(name, length):
    loss, labels = SAME[name]
    record = of_length(length)
    assert record[name].any()
    same(ours(loss, record, labels), record[name])


@pytest.mark.parametrize("length", LENGTHS)
def test_the_lambda_loss_is_rax_s_over_its_length_and_log_2(length):
    record = of_length(length)
    assert record["lambda_pairwise_logistic"].any()
    same(length * math.log(2) * ours(losses.lipo_lambda, record), record["lambda_pairwise_logistic"])


@pytest.mark.parametrize("length", LENGTHS)
def test_the_pairwise_mse_is_the_mean_of_what_rax_counts_twice(length):
    record = of_length(length)
    assert record["pairwise_mse"].any()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        mean = losses.pairwise_mse(record["scores"], record["labels"], record["valid"])
    count = record["valid"].sum(-1)
    same(np.asarray(mean) * count * (count - 1), record["pairwise_mse"])
