"""Whole runs on eight devices: the examples, losses and parameters of one device, from the config's mesh alone."""

import jax
import numpy as np
import pytest

from palign.sharding.mesh import to_global
from palign.train.build import build
from palign.train.loop import run
from tests.compiled import uncached
from tests.recipes.tiny_runs import config, one_device, write_pairs
from tests.trees import largest_difference

MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(data=4, tensor=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, tensor=4),
    dict(data=2, context=2, tensor=2),
]
STEPS = 5


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A DPO run whose policy and reference come from a run of another mesh."""
    root = tmp_path_factory.mktemp("mesh")
    file = write_pairs(root / "pairs.jsonl", 60, prompts=40)
    shape = dict(model={"num_heads": 4, "num_key_heads": 2, "remat": "full"}, data={"rows_per_step": 8})
    with one_device():
        run(config(file, train={"max_steps": 3}, **shape), root / "sft")
    sources = dict(init_from=str(root / "sft"), reference_from=str(root / "sft"))
    return file, dict(
        **shape,
        **sources,
        objective={"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1},
        optimizer={"eps": 1e-3},  # Adam's division by tiny second moments would enlarge what rounding differs in
        train={"max_steps": STEPS},
    )


def five_steps(file, sections, workdir):
    """Example ids, losses and parameters of five steps."""
    made, state = build(config(file, **sections), workdir)
    example_ids, losses = [], []
    for step in range(STEPS):
        batch = to_global(made.mesh, made.data.train.step_batch(step, micro_batches=1))
        example_ids.append(np.asarray(batch.example_id))
        before, (state, metrics) = state, made.train_step(state, made.aux, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
        losses.append(float(metrics["loss"].sum))
    assert made.train_step.compiled._cache_size() == 1
    return example_ids, losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory):
    with one_device():
        return five_steps(*settings, tmp_path_factory.mktemp("one") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_run_on_any_mesh_is_the_run_of_one_device(settings, expected, mesh, tmp_path):
    file, sections = settings
    with uncached():
        example_ids, losses, params = five_steps(file, sections | {"mesh": mesh}, tmp_path / "run")
    np.testing.assert_array_equal(example_ids, expected[0])
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    assert largest_difference(params, expected[2]) < 1e-5


@pytest.mark.slow
def test_a_reward_model_on_a_mesh_of_all_axes_is_that_of_one_device(settings, tmp_path):
    file, sections = settings
    judged = sections | dict(objective={"loss_type": ["bradley_terry"], "reference": "none"}, reference_from="")
    judged["model"] = judged["model"] | {"value_head": 1}
    with one_device():
        _, losses, params = five_steps(file, judged, tmp_path / "one")
    with uncached():
        _, found, others = five_steps(file, judged | {"mesh": dict(data=2, context=2, tensor=2)}, tmp_path / "run")
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert largest_difference(others, params) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["reference", "base"])
@pytest.mark.parametrize("placement", ["whole", "host"])
def test_frozen_models_may_lie_elsewhere(settings, expected, placement, lora, tmp_path):
    """On every device of `fsdp`, or in the host's memory; the numbers are those of one device."""
    file, sections = settings
    sections = sections | {"lora": lora}
    if lora:
        with one_device():
            expected = five_steps(file, sections, tmp_path / "one")
    elsewhere = sections | {"mesh": dict(fsdp=4, tensor=2), "frozen": {"placement": placement}}
    with uncached():
        made, _ = build(config(file, **elsewhere), tmp_path / "look")
        _, losses, params = five_steps(file, elsewhere, tmp_path / "run")
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    assert largest_difference(params, expected[2]) < 1e-5
    frozen = made.aux["base" if lora else "reference"]
    kernel, norm = frozen["layers"]["mlp"]["up"]["kernel"], frozen["final_norm"]["scale"]
    assert kernel.sharding.memory_kind == ("pinned_host" if placement == "host" else "device")
    assert norm.sharding.memory_kind == "device"
    assert kernel.sharding.spec[1] == (None if placement == "whole" else "fsdp") and kernel.sharding.spec[2] == "tensor"


@pytest.mark.slow
def test_key_heads_that_a_mesh_does_not_divide_are_said_to_be_whole(settings, tmp_path, capsys):
    file, sections = settings
    build(config(file, **sections, mesh={"data": 2, "tensor": 4}), tmp_path / "run")
    said = (
        "config.mesh.tensor = 4 does not divide config.model.num_key_heads = 2: every device of the axis holds all key"
    )
    assert said in capsys.readouterr().err
