"""Plans: every example once an epoch, every limit kept, full rows, and lengths that say nothing about steps."""

import time

import numpy as np
import pytest

from palign.data.pack import pack_row, row_shape
from palign.data.plan import (
    RowNeeds,
    fill_ratio,
    fit_trees,
    plan_epochs,
    plan_evaluation,
    plan_padded,
    row_needs,
)
from tests.data.samples import random_tree


def random_needs(n, seed=0, longest=1024):
    rng = np.random.default_rng(seed)
    tokens = np.clip(np.exp(rng.normal(5, 0.8, n)), 8, longest).astype(np.int64)
    return RowNeeds(tokens, tokens // 2, np.ones(n, np.int64))


def rows_of(plan):
    return [plan.row(r).tolist() for r in range(len(plan.epoch_of_row))]


def test_every_epoch_holds_each_example_once_in_another_order():
    needs, shape = random_needs(500), row_shape(1024, responses=2)
    plan = plan_epochs(needs, shape, rows_per_step=4, epochs=3, seed=0)
    orders = [[i for r, row in enumerate(rows_of(plan)) for i in row if plan.epoch_of_row[r] == e] for e in range(3)]
    assert all(sorted(order) == list(range(500)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert (np.diff(plan.epoch_of_row) >= 0).all()
    assert plan.num_steps == -(-len(plan.epoch_of_row) // 4)


@pytest.mark.parametrize(
    "changes", [{}, {"trees": 3}, {"targets": 520}, {"pairs": 4}, {"trees": 1}, {"targets": 512, "pairs": 2}]
)
def test_rows_keep_every_capacity(changes):
    needs, shape = random_needs(400), row_shape(1024, responses=2)._replace(**changes)
    plan = plan_epochs(needs, shape, rows_per_step=1, epochs=1, seed=0, window=50)
    for row in rows_of(plan):
        assert 1 <= len(row) <= shape.trees
        for name in needs._fields:
            assert getattr(needs, name)[row].sum() <= getattr(shape, name)
    assert sorted(plan.members) == list(range(400))


def test_rows_are_nearly_full():
    needs, shape = random_needs(3000), row_shape(2048, responses=2)
    assert fill_ratio(plan_epochs(needs, shape, rows_per_step=8, epochs=2, seed=0), needs, shape) > 0.99
    assert fill_ratio(plan_evaluation(needs, shape, rows_per_step=8), needs, shape) > 0.99


def test_lengths_say_nothing_about_steps():
    shape = row_shape(1024, responses=2)
    correlations, num_rows = [], 0
    for seed in range(50):
        needs = random_needs(1500, seed)
        plan = plan_epochs(needs, shape, rows_per_step=1, epochs=1, seed=seed)
        num_rows = len(plan.epoch_of_row)
        row_of_member = np.repeat(np.arange(num_rows), np.diff(plan.offsets))
        correlations.append(np.corrcoef(row_of_member, needs.tokens[plan.members])[0, 1])
    # Rows in random order give correlations of 0 with a deviation of at most 1/sqrt(rows); unshuffled rows gave -0.3.
    assert abs(np.mean(correlations)) < 3 / np.sqrt(50 * num_rows)


def test_plans_are_pure_functions_of_lengths_and_seed():
    needs, shape = random_needs(300), row_shape(1024, responses=2)
    one, two, other = (plan_epochs(needs, shape, rows_per_step=2, epochs=2, seed=s) for s in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one.members, other.members)


def test_max_steps_ends_the_plan_and_changes_nothing_before():
    needs, shape = random_needs(300), row_shape(1024, responses=2)
    whole = plan_epochs(needs, shape, rows_per_step=4, epochs=4, seed=0)
    for epochs in (None, 4, 100):
        part = plan_epochs(needs, shape, rows_per_step=4, epochs=epochs, max_steps=20, seed=0)
        assert part.num_steps == 20 and len(part.epoch_of_row) == 80
        assert rows_of(part) == rows_of(whole)[:80]
    assert plan_epochs(needs, shape, rows_per_step=4, epochs=1, max_steps=10**6, seed=0).num_steps < whole.num_steps


def test_padded_plans_hold_one_example_a_row():
    plan = plan_padded(10, examples_per_step=4, epochs=2, seed=0)
    assert plan.num_steps == 5 and rows_of(plan) == [[i] for i in plan.members]
    assert sorted(plan.members[:10]) == sorted(plan.members[10:]) == list(range(10))
    assert plan.row(20).size == 0


def test_evaluation_takes_each_example_once_in_order():
    needs, shape = random_needs(200), row_shape(1024, responses=2)
    plan = plan_evaluation(needs, shape, rows_per_step=8)
    assert sorted(plan.members) == list(range(200))
    heads = [row[0] for row in rows_of(plan)]
    assert heads == sorted(heads)


def test_100k_examples_are_planned_in_seconds():
    needs, shape = random_needs(100_000), row_shape(2048, responses=2)
    start = time.process_time()
    plan_epochs(needs, shape, rows_per_step=64, epochs=1, seed=0)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("layout", ["packed", "unshared"])
@pytest.mark.parametrize("policy", ["best_worst", "all", "adjacent", "random"])
def test_needs_are_what_the_packer_uses(layout, policy):
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, id) for id in range(12)]
    needs = row_needs(trees, layout=layout, pair_policy=policy)
    shape = row_shape(512, responses=8, pair_policy=policy)
    for i, tree in enumerate(trees):
        row = pack_row([tree], shape, policy, layout, seed=0)
        used = ((row.group > 0).sum(), (row.target_slot > 0).sum(), (row.pairs[:, 0] > 0).sum())
        assert used == (needs.tokens[i], needs.targets[i], needs.pairs[i])


def test_oversize_trees_are_an_error_that_names_the_row_needed():
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, id, K=8) for id in range(20)]
    needed = -(-int(row_needs(trees, layout="packed", pair_policy="all").tokens.max()) // 8) * 8
    assert fit_trees(trees, row_shape(needed, responses=8, block=8), layout="packed") == (trees, {})
    with pytest.raises(ValueError, match=rf"row of {needed} tokens .* policy 'subset'"):
        fit_trees(trees, row_shape(needed - 8, responses=8, block=8), layout="packed")
    with pytest.raises(ValueError, match="up to 8 responses"):
        fit_trees(trees, row_shape(needed, responses=7, block=8), layout="packed")


@pytest.mark.parametrize("layout", ["packed", "unshared"])
def test_subset_keeps_as_many_responses_as_fit(layout):
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, id) for id in range(60)]
    shape = row_shape(48 if layout == "packed" else 64, responses=6, block=8)
    fitted, counts = fit_trees(trees, shape, layout=layout, oversize="subset", seed=1)
    changed = [(a, b) for a, b in zip(trees, fitted, strict=True) if a is not b]
    assert counts["oversize_trees"] == len(changed) > 5
    assert counts["oversize_responses_removed"] == sum(len(a.responses) - len(b.responses) for a, b in changed)
    for before, after in changed:
        assert (max(before.scores), min(before.scores)) == (max(after.scores), min(after.scores))
    plan_epochs(
        row_needs(fitted, layout=layout, pair_policy="all"), shape._replace(pairs=99), rows_per_step=1, epochs=1, seed=0
    )
    with pytest.raises(ValueError, match="even best and worst alone"):
        fit_trees(trees, row_shape(8, responses=6, block=8), layout=layout, oversize="subset")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None}, "no end"), ({"epochs": 0}, "epochs is 0"), ({"max_steps": 0}, "max_steps is 0"),
        ({"rows_per_step": 0}, "rows_per_step is 0"), ({"window": 0}, "window is 0"),
    ],
)  # fmt: skip
def test_senseless_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings = {"rows_per_step": 1, "epochs": 1, "seed": 0} | changes
        plan_epochs(random_needs(9), row_shape(1024, responses=2), **settings)


def test_an_example_that_fits_no_row_or_no_examples_are_refused():
    with pytest.raises(ValueError, match=r"needs \d+ tokens but a row holds 64.*'subset'"):
        plan_epochs(random_needs(9), row_shape(64, responses=2), rows_per_step=1, epochs=1, seed=0)
    with pytest.raises(ValueError, match="no examples"):
        plan_evaluation(random_needs(0), row_shape(64, responses=2), rows_per_step=1)
