"""Steps as a pure function of their number, read-ahead, and fingerprints."""

import contextlib
import dataclasses
import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

from palign.data.loader import Dataset, batches, fingerprint
from palign.data.pack import row_shape
from palign.data.plan import plan_epochs, row_needs
from tests.data.samples import random_tree


def dataset(n=40, rows_per_step=8, seed=0):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, id) for id in range(n)]
    shape = row_shape(256, trees=4, responses=8, pair_policy="random", block=16)
    needs = row_needs(trees, layout="packed", pair_policy="random")
    plan = plan_epochs(needs, shape, rows_per_step=rows_per_step, epochs=3, seed=seed)
    return Dataset(trees, shape, plan, "random", "packed", seed)


def same(one, two):
    return all(a is b or np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_each_example_comes_once_an_epoch_and_only_the_last_step_has_empty_rows():
    data = dataset()
    steps = [data.step_batch(s, micro_batches=2) for s in range(data.num_steps)]
    ids = [i for batch in steps for i in batch.example_id.reshape(-1) if i >= 0]
    assert sorted(ids) == sorted(list(range(40)) * 3)
    assert all(batch.valid.any(axis=(2, 3)).all() for batch in steps[:-1])
    assert not steps[-1].valid.any(axis=(2, 3)).all()


@pytest.mark.parametrize("A", [1, 2, 4, 8])
def test_micro_batches_are_the_same_rows_laid_out_otherwise(A):
    data = dataset()
    whole, split = data.step_batch(1, micro_batches=1), data.step_batch(1, micro_batches=A)
    assert split.token.shape == (A, 8 // A, 256)
    assert same(whole[:-3], [leaf.reshape(1, 8, *leaf.shape[2:]) for leaf in split[:-3]])


def test_processes_build_the_rows_of_their_devices():
    data = dataset()
    whole = data.step_batch(0, micro_batches=2)
    parts = [data.step_batch(0, micro_batches=2, rows=slice(i, i + 2)) for i in (0, 2)]
    assert same(whole[:-3], [np.concatenate(leaves, axis=1) for leaves in zip(*(p[:-3] for p in parts), strict=True)])


@pytest.mark.parametrize("read_ahead", [0, 1, 2, 5])
def test_the_iterator_yields_every_step_in_order_from_any_step(read_ahead):
    data = dataset()
    for start in (0, 2, data.num_steps - 1, data.num_steps):
        got = list(batches(data, start_step=start, micro_batches=2, read_ahead=read_ahead))
        assert [step for step, _ in got] == list(range(start, data.num_steps))
        assert all(same(batch, data.step_batch(step, micro_batches=2)) for step, batch in got)


def test_the_rows_of_the_next_steps_are_made_while_a_step_is_taken():
    made = [threading.Event() for _ in range(3)]

    class Watched(Dataset):
        def step_batch(self, step, **layout):
            batch = super().step_batch(step, **layout)
            if step < len(made):
                made[step].set()
            return batch

    with contextlib.closing(batches(Watched(**vars(dataset())), start_step=0, micro_batches=2)) as steps:
        next(steps)
        assert all(step.wait(timeout=60) for step in made)  # nobody has asked for steps 1 and 2


def test_closing_the_iterator_stops_its_threads():
    before = threading.active_count()
    iterators = [batches(dataset(), start_step=0, micro_batches=1) for _ in range(5)]
    for iterator in iterators:
        next(iterator)
        iterator.close()
    deadline = iter(range(200))
    while threading.active_count() > before and next(deadline, None) is not None:
        threading.Event().wait(0.02)
    assert threading.active_count() <= before


def test_errors_in_a_thread_reach_the_caller():
    data = dataset()
    broken = dataclasses.replace(data, trees=[t._replace(scores=()) for t in data.trees])
    with pytest.raises(ValueError, match="one score a response"):
        list(itertools.islice(batches(broken, start_step=0, micro_batches=1), 1))


def test_it_needs_no_parsed_flags_and_no_main_guard():
    program = (
        "import numpy as np\n"
        "from palign.data import loader, pack, plan, tokenize\n"
        "a = np.ones(3, np.int32)\n"
        "trees = [tokenize.TokenTree(a, (a, a), (1.0, 0.0), i) for i in range(8)]\n"
        "data = loader.Dataset(trees, pack.row_shape(64, responses=2), "
        "plan.plan_padded(8, examples_per_step=2, epochs=1, seed=0), 'all', 'packed', 0)\n"
        "print(sum(b.token.sum() for _, b in loader.batches(data, start_step=0, micro_batches=1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "72", done.stderr


def test_senseless_requests_are_refused():
    data = dataset()
    for step in (-1, data.num_steps):
        with pytest.raises(ValueError, match="outside the plan's steps"):
            data.step_batch(step, micro_batches=1)
    with pytest.raises(ValueError, match="3 micro-batches do not divide a step's 8 rows"):
        data.step_batch(0, micro_batches=3)
    with pytest.raises(ValueError, match="takes none of the 4 rows"):
        data.step_batch(0, micro_batches=2, rows=slice(4, 6))
    with pytest.raises(ValueError, match="start_step=-1"):
        next(batches(data, start_step=-1, micro_batches=1))


def test_cached_reference_values_reach_their_targets():
    data = dataset()
    cached = [[ids.astype(np.float32) / 8 for ids in tree.responses] for tree in data.trees]
    batch = dataclasses.replace(data, reference_logps=cached).step_batch(0, micro_batches=2)
    assert np.array_equal(batch.reference_logps, np.where(batch.target_slot > 0, batch.target_token / 8, 0))


def test_the_fingerprint_changes_with_anything_that_changes_a_batch():
    data = dataset()
    tree = data.trees[3]
    tokens = tree.prompt.copy()
    tokens[0] += 1
    others = [
        dataclasses.replace(data, seed=1),
        dataclasses.replace(data, pair_policy="all"),
        dataclasses.replace(data, layout="unshared"),
        dataclasses.replace(data, shape=data.shape._replace(trees=5)),
        dataclasses.replace(data, plan=data.plan._replace(rows_per_step=4)),
        dataclasses.replace(data, plan=data.plan._replace(members=data.plan.members[::-1].copy())),
        *(
            dataclasses.replace(data, trees=[*data.trees[:3], changed, *data.trees[4:]])
            for changed in (
                tree._replace(prompt=tokens),
                tree._replace(id=99),
                tree._replace(scores=tuple(s + 1 for s in tree.scores)),
            )
        ),
    ]
    prints = [fingerprint(d) for d in (data, *others)]
    assert len(set(prints)) == len(prints) and fingerprint(dataset()) == prints[0]
