"""Plans for forced host devices: what they compute is what a run would place, compile and multiply."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from palign.config.schema import DataConfig, LoraConfig, MeshConfig, ModelConfig, ObjectiveConfig, RunConfig
from palign.models.transformer import make_language_model
from palign.plan.cost import RECOMPUTED, bytes_on_device, work_of
from palign.plan.plan import DoesNotFitError, Origin, make_plan
from palign.plan.show import from_json, print_plan, to_json
from palign.plan.step import abstract_step
from palign.plan.topology import parse_topology
from palign.sharding.mesh import make_mesh
from palign.train.optimizer import make_optimizer
from palign.train.state import new_state, state_shardings
from tests.compiled import uncached

MODEL = ModelConfig(
    vocab_size=200, num_layers=3, dim=32, num_heads=4, num_key_heads=2, hidden_dim=48, tie_embedding=False
)
CONFIG = RunConfig(
    model=MODEL,
    data=DataConfig(max_length=64, row_length=128, rows_per_step=16, micro_batches=2, block=16),
    objective=ObjectiveConfig(head_chunk=16),
    mesh=MeshConfig(data=1, fsdp=-1),
    reference_from="sft",
)
ORIGIN = Origin("configs/x.py", "dpo", ())
STAGED = """from ml_collections import ConfigDict

from palign.config.load import ordered


def get_config():
    stages = ordered(one=dict(data=dict(records="reversed")), other=dict(init_from="one"))
    return ConfigDict(dict(model=dict(vocab_size=64), data=dict(rows_per_step=8), stages=stages))
"""
METHODS = {
    "dpo, live": dict(loss_type=("dpo",)),
    "dpo, cached": dict(loss_type=("dpo",), reference="cached"),
    "sft": dict(loss_type=("sft",)),
    "dpo and sft": dict(loss_type=("dpo", "sft"), loss_weights=(1.0, 0.1)),
    "tdpo": dict(loss_type=("tdpo2",), hyper={"alpha": 0.5}),
    "aligndistil": dict(loss_type=("aligndistil",), hyper={"beta0": 0.1, "scale": 20.0}),
    "aligndistil, cached": dict(loss_type=("aligndistil",), hyper={"beta0": 0.1, "scale": 20.0}, teachers="cached"),
    "kto": dict(loss_type=("kto",)),
}


def config_of(objective, **model):
    sources = dict(reference_from="sft")
    if "aligndistil" in objective["loss_type"]:
        sources = dict(reference_from="", teacher_from="dpo", reverse_from="reverse")
    elif objective["loss_type"] == ("sft",):
        sources = dict(reference_from="")
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, **model),
        objective=ObjectiveConfig(head_chunk=16, **objective),
        **sources,
    )


@functools.cache
def tiny_plan():
    with uncached():
        return make_plan(CONFIG, parse_topology("cpu:8"), ORIGIN)


def test_a_plan_places_what_a_run_places():
    plan, mesh = tiny_plan(), make_mesh(data=1, fsdp=8)
    lm, tx = make_language_model(MODEL), make_optimizer(CONFIG.optimizer, 10)
    shapes = jax.eval_shape(lambda key: new_state(lm.init(key), tx), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = jax.device_put(zeros, state_shardings(mesh, lm, tx))
    local = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    assert plan.memory.parameters == plan.memory.frozen == local(state.params)
    assert plan.memory.optimizer == local(state.opt_state)
    assert plan.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    arguments = 2 * local(state.params) + local(state.opt_state) + plan.memory.batch
    unread = arguments - (plan.memory.total - plan.memory.temporary)  # of the batch: the compiler drops what DPO skips
    assert 0 <= unread < 0.25 * plan.memory.batch


def test_a_plan_finds_the_gathers_of_fsdp_and_no_faults():
    plan = tiny_plan()
    layers = 7 * 3 * 2  # matrices of a layer; policy, reference and backward; micro-batches
    gathers = next(exchange for exchange in plan.exchanges if exchange.kind == "all-gather")
    assert gathers.counted and gathers.times >= layers * MODEL.num_layers
    assert plan.faults == ()


def test_a_plan_is_printed_with_sources_and_survives_json(capsys):
    plan = tiny_plan()
    assert to_json(from_json(to_json(plan))) == to_json(plan)
    print_plan(plan)
    out = capsys.readouterr().out
    assert "compiled" in out and "computed" in out and "MFU" in out and "fault" not in out


SAID = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 37.17G of 15.75G hbm. Exceeded hbm capacity by 21.42G.\n\nTotal hbm usage >= 37.42G:"
)


@pytest.mark.parametrize("refused", [True, False])
def test_a_step_that_does_not_fit_is_told_with_figures_and_remedies(monkeypatch, refused):
    """A TPU's compiler refuses it, a GPU's compiles it."""

    def compile_step(*arguments):
        if refused:
            raise jax.errors.JaxRuntimeError(SAID)
        sizes = dict(argument_size_in_bytes=2**40, output_size_in_bytes=0, alias_size_in_bytes=0, temp_size_in_bytes=0)
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))

    def step_of(*arguments, **options):
        lowered = SimpleNamespace(compile=compile_step)
        return abstract_step(*arguments, **options)._replace(compiled=SimpleNamespace(lower=lambda *_: lowered))

    monkeypatch.setattr("palign.plan.plan.abstract_step", step_of)
    figures = "Used 37.17G of 15.75G hbm" if refused else "1024.00 GiB of 16.00 GiB"
    with pytest.raises(DoesNotFitError, match=rf"does not fit.*{figures} .*parameters .*; try .*micro_batches"):
        make_plan(CONFIG, parse_topology("cpu:8"), ORIGIN)


def test_a_plan_without_a_vocabulary_is_refused():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=0))
    with pytest.raises(ValueError, match=r"config.model.vocab_size = 0"):
        abstract_step(config, jax.devices()[:8])


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        pytest.param(
            name, remat, marks=[] if (name, remat) in (("dpo, live", "full"), ("sft", "none")) else pytest.mark.slow
        )
        for name in METHODS
        for remat in RECOMPUTED
    ],
)
def test_products_are_those_of_the_traced_step(name, remat):
    """Against the step's own jaxpr: every matrix product, loops multiplied by the trips that the assumed row makes."""
    step = abstract_step(config_of(METHODS[name], remat=remat), jax.devices()[:1])
    with jax.set_mesh(step.mesh):
        traced = step.compiled.trace(step.state, step.aux, step.batch).jaxpr
    expected = traced_flops(traced.jaxpr, step)
    assert math.isclose(work_of(step).flops, expected, rel_tol=1e-9)


def traced_flops(jaxpr, step, times=1):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            contracted = math.prod(eqn.invars[0].aval.shape[i] for i in left)
            total += 2 * times * math.prod(eqn.outvars[0].aval.shape) * contracted
        for name, inner in inner_jaxprs(eqn):
            total += traced_flops(inner, step, times * trips(eqn, name, inner, step))
    return total


def inner_jaxprs(eqn):
    for name, value in eqn.params.items():
        if eqn.params.get("branches_platforms") and name == "branches":
            value = value[eqn.params["branches_platforms"].index(None) :]  # what every platform but a CPU computes
        for item in value if isinstance(value, list | tuple) else [value]:
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield name, inner


def trips(eqn, name, inner, step):
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name != "while" or name == "cond_jaxpr":
        return 1
    pairs = step.rows_per_device * int(np.sum(step.row.block_pairs[:, 1] >= 0))
    targets = step.rows_per_device * int(np.sum(step.row.target_slot > 0))
    return targets / 16 if "[16,256]" in str(inner) else pairs / 16  # chunks of the heads see the vocabulary


def test_factors_are_planned_without_the_gradients_of_their_base():
    whole = CONFIG if CONFIG.init_from else dataclasses.replace(CONFIG, init_from="sft")
    steps = [
        abstract_step(dataclasses.replace(whole, lora=LoraConfig(rank=rank)), jax.devices()[:1]) for rank in (0, 2)
    ]
    dense, low = (bytes_on_device(step.state) for step in steps)
    assert low < dense / 4 and steps[1].aux.keys() == {"base"}
    assert work_of(steps[1]).flops < work_of(steps[0]).flops
