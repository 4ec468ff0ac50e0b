from collections import Counter

import numpy as np
import pytest

from palign.data.mixture import Mixture
from palign.data.pack import row_shape
from palign.data.plan import plan_epochs, plan_padded
from tests.data.test_plan import random_needs

SOURCES = [0] * 60 + [1] * 30 + [2] * 10


def orders(mixture, epochs, seed=0):
    return [mixture.order(epoch, np.random.default_rng((seed, epoch))) for epoch in range(epochs)]


def test_an_epoch_holds_the_share_of_each_source_that_its_weight_says():
    mixture = Mixture(SOURCES, (1, 1, 2), seed=0)
    assert mixture.counts == [25, 25, 50] and mixture.sizes == [60, 30, 10]
    for order in orders(mixture, 5):
        assert np.bincount(np.take(SOURCES, order)).tolist() == [25, 25, 50]
    odd = Mixture(SOURCES, (1, 1, 1), seed=0)
    assert sum(odd.counts) == 100 and set(odd.counts) == {33, 34}


def test_the_examples_of_a_source_take_turns():
    mixture = Mixture(SOURCES, (1, 1, 2), seed=0)
    seen = Counter()
    for order in orders(mixture, 7):
        seen.update(order.tolist())
        for source in range(3):
            counts = [seen[i] for i in np.flatnonzero(np.equal(SOURCES, source))]
            assert max(counts) - min(counts) <= 1
    assert sum(seen.values()) == 700


def test_an_epoch_is_a_pure_function_of_weights_and_seed_and_shuffled():
    one, two, other = (orders(Mixture(SOURCES, (1, 1, 2), seed=s), 3, seed=s) for s in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[2], other[2]) and not np.array_equal(one[0], one[1])
    steps = np.take(SOURCES, one[0]).reshape(10, 10)
    assert all(len(set(step)) > 1 for step in steps.tolist())  # sources do not come one after another


def test_a_plan_follows_the_mixture_packed_and_padded():
    needs, shape = random_needs(100, longest=300), row_shape(1024, responses=2, block=128)
    mixture = Mixture(SOURCES, (1, 1, 2), seed=3)
    packed = plan_epochs(needs, shape, rows_per_step=4, epochs=3, seed=3, order=mixture.order)
    padded = plan_padded(100, examples_per_step=4, epochs=3, seed=3, order=mixture.order)
    for plan in (packed, padded):
        for epoch, order in enumerate(orders(mixture, 3, seed=3)):
            rows = np.flatnonzero(plan.epoch_of_row == epoch)
            members = plan.members[plan.offsets[rows[0]] : plan.offsets[rows[-1] + 1]]
            assert sorted(members) == sorted(order)
    longer = plan_epochs(needs, shape, rows_per_step=4, epochs=5, seed=3, order=mixture.order)
    assert np.array_equal(longer.members[: packed.members.size], packed.members)  # a run that goes on longer


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([0, 0, 1], (1, 1, 1), "source 2 of the mixture gives 1 of 3 examples of an epoch and has 0"),
        ([0, 0, 1], (1, 0.01), "source 1 of the mixture gives 0 of 3 examples"),
    ],
)
def test_a_source_without_examples_or_share_is_refused(sources, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sources, weights, seed=0)
