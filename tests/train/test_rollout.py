"""On-policy batches: whose responses they hold, when these are drawn, and that a run which goes on draws the same."""

import pathlib

import jax
import numpy as np
import pytest

from palign.config.load import resolve_run
from palign.config.schema import RolloutConfig
from palign.data.loader import Dataset
from palign.data.pack import row_shape
from palign.data.plan import plan_epochs, row_needs
from palign.data.tokenize import TokenTree
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from palign.sharding.rules import parameter_shardings
from palign.train.build import check_config
from palign.train.loop import run
from palign.train.metrics import Reporter, read_metrics
from palign.train.prepare import reserve_room
from palign.train.rollout import make_draw, on_policy_batches, part_of_step
from palign.train.sources import load_run
from tests.compiled import uncached
from tests.recipes.tiny_runs import one_device, plain, write_pairs
from tests.trees import TINY

ROOM = 6
EOS = 3


@pytest.fixture(scope="module")
def dataset():
    """Eleven prompts for two epochs and a bit: one comes again before the epoch's last has come."""
    rng = np.random.default_rng(0)
    trees = [
        reserve_room(TokenTree(rng.integers(4, 40, rng.integers(2, 7)).astype(np.int32), (), (), i), ROOM)
        for i in range(11)
    ]
    shape = row_shape(32, responses=1, trees=4, block=16)
    needs = row_needs(trees, layout="packed", pair_policy="best_worst")
    return Dataset(
        trees, shape, plan_epochs(needs, shape, rows_per_step=2, seed=0, epochs=3), "best_worst", "packed", 0
    )


def responses_in(batch):
    """(example, response) of a batch, from its target table alone."""
    found = []
    for row in range(batch.token.shape[1]):
        slots = batch.target_slot[0, row]
        for e, example in enumerate(batch.example_id[0, row]):
            if example >= 0:
                found.append((int(example), batch.target_token[0, row][slots == 1 + e].tolist()))
    return found


def test_every_example_is_answered_with_what_was_drawn_for_it(dataset):
    asked = []

    def draw(params, prompts, key):
        asked.append((params, [prompt.tolist() for prompt in prompts], key))
        count = sum(len(prompts) for _, prompts, _ in asked)
        answers = [np.arange(1 + i % ROOM, dtype=np.int32) + 10 for i in range(count - len(prompts), count)]
        return answers, np.asarray([answer.size < ROOM for answer in answers])

    params = iter("abcdefghij")
    steps = list(on_policy_batches(dataset, draw, lambda: next(params), every=2, start=0, micro_batches=1, seed=5))
    assert [step for step, _, _ in steps] == list(range(dataset.num_steps))
    assert [name for name, _, _ in asked] == list("abcdefghij")[: -(-dataset.num_steps // 2)]
    drawn = iter(range(10**6))
    for step, batch, _ in steps:
        got = responses_in(batch)
        assert [example for example, _ in got] == [tree.id for tree in part_of_step(dataset, step).trees]
        for example, tokens in got:
            assert tokens == [10 + t for t in range(1 + next(drawn) % ROOM)]
            prompt = dataset.trees[example].prompt.tolist()
            assert prompt in asked[step // 2][1]
        assert batch.token.shape[:2] == (1, 2)
    lengths = [1 + i % ROOM for i in range(len(asked[0][1]))]
    assert steps[0][2] == {
        "completions/mean_length": pytest.approx(np.mean(lengths)),
        "completions/clipped_ratio": pytest.approx(np.mean(np.equal(lengths, ROOM))),
    }
    # A run that goes on at a draw asks the same: the same prompts under the same key.
    before = len(asked)
    _, batch, _ = next(on_policy_batches(dataset, draw, lambda: "z", every=2, start=2, micro_batches=2, seed=5))
    (_, prompts, key), (_, first_prompts, first_key) = asked[before], asked[1]
    assert prompts == first_prompts and (jax.random.key_data(key) == jax.random.key_data(first_key)).all()
    assert batch.token.shape[:2] == (2, 1)


def drawer(dataset, devices, tensor=1, context=1):
    """Draws responses to five prompts, by key."""
    lm = make_language_model(TINY)
    params = lm.init(jax.random.key(0))
    mesh = make_mesh(context=context, tensor=tensor, devices=jax.devices()[:devices])
    params = jax.device_put(params, parameter_shardings(mesh, params))
    draw = make_draw(lm, mesh, dataset, RolloutConfig(every=1, max_new_tokens=ROOM), eos_ids=(EOS,))
    prompts = [tree.prompt for tree in dataset.trees[:5]]
    return lambda key: draw(params, prompts, jax.random.key(key))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_draw_is_the_policy_s_own_and_ends_with_eos_or_at_its_room(dataset, devices):
    with uncached():
        draw = drawer(dataset, devices)
        (responses, finished), (again, _), (other, _) = draw(1), draw(1), draw(2)
    for one, two in zip(responses, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(one.tolist() != two.tolist() for one, two in zip(responses, other, strict=True))
    for response, ended in zip(responses, finished, strict=True):
        assert 1 <= response.size <= ROOM and ended == (response[-1] == EOS)
        assert ended or response.size == ROOM


def test_tensor_and_context_axes_draw_what_one_device_draws(dataset):
    with uncached():
        (responses, _), (expected, _) = (drawer(dataset, *where)(1) for where in ((8, 2, 4), (1, 1, 1)))
    for one, two in zip(responses, expected, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("rollout")
    file = write_pairs(root / "pairs.jsonl", 60, prompts=40)
    short = {"max_steps": 3, "eval_every": 3}
    with one_device():
        run(resolve_run(plain(file, train=short)), root / "sft")
        for name, rate in (("dpo", 0.02), ("reverse", 0.03)):
            more = dict(train=short, init_from=str(root / "sft"), optimizer={"learning_rate": rate})
            run(resolve_run(plain(file, **more)), root / name)
    return file, root


def on_policy(file, root: pathlib.Path, **sections):
    sources = {"init_from": str(root / "sft"), "teacher_from": str(root / "dpo"), "reverse_from": str(root / "reverse")}
    given = {
        "objective": {"loss_type": ["aligndistil"], "scale": 1.0},
        "rollout": {"every": 2, "max_new_tokens": 8},
        "train": {"max_steps": 6, "checkpoint_every": 2, "eval_every": 6, "log_every": 1, "keep": 9},
    }
    return plain(file, **sources, **(given | sections))


def test_a_run_on_its_own_responses_goes_on_bit_equal_and_lowers_the_divergence(teachers, tmp_path, monkeypatch):
    settings = on_policy(*teachers)
    with one_device():
        straight = run(resolve_run(settings), tmp_path / "straight")

        advance = Reporter.advance

        def stop(self, done, *args, **kwargs):
            if done == 5:  # step 4 is saved
                raise KeyboardInterrupt
            advance(self, done, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Reporter, "advance", stop)
            run(resolve_run(settings), tmp_path / "stopped")
        again = run(resolve_run(settings), tmp_path / "stopped")
        mesh = make_mesh(data=1, devices=jax.devices()[:1])
        one, two = (load_run(str(tmp_path / name), mesh=mesh).params for name in ("straight", "stopped"))
    assert again == straight
    jax.tree.map(np.testing.assert_array_equal, one, two)
    lines = [line for line in read_metrics(tmp_path / "straight") if "loss" in line]
    assert all(0 < line["completions/mean_length"] <= 8 for line in lines)
    assert lines[0]["completions/mean_length"] == lines[1]["completions/mean_length"]  # one draw for two steps
    assert lines[-1]["divergence"] < lines[0]["divergence"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"loss_type": ["sft"]}}, "rollout.every = 2: sft learns from responses that somebody"),
        ({"rollout": {"every": 2, "max_new_tokens": 32}}, "rollout.max_new_tokens = 32 leaves no room"),
        ({"train": {"checkpoint_every": 3}}, "train.checkpoint_every = 3: expected a multiple"),
        ({"rollout": {"every": 0, "temperature": 0.5}}, "rollout.temperature = 0.5 has no effect while"),
    ],
)
def test_settings_that_cannot_be_are_answered(sections, message, tmp_path):
    settings = on_policy(tmp_path / "pairs.jsonl", tmp_path) | sections
    if "objective" in sections:
        del settings["teacher_from"], settings["reverse_from"]
    with pytest.raises(ValueError, match=f"config.{message}"):
        check_config(resolve_run(settings))
