"""What each memory setting saves: the DPO step compiled, nothing run, its memory read from the compiled program.

    python -m benchmarks.memory                               # for this machine's processor
    python -m benchmarks.memory --topology=v5e:2x2            # for TPU chips, with libtpu but without a TPU

Each line is the first line with one setting changed. State: parameters, optimizer, models that follow. Frozen: the
reference, or the base under LoRA factors. Temporary: everything that lives within a step. MiB of one device.

C7: temporaries of the step on 8 pairs of 2 x 512 tokens (width 256, 4 layers, a live reference), of the plain JAX
contestant, of palign with the prompt before every response, and of palign with the prompt once.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from safetensors.numpy import load_file

from benchmarks import cases, driver, single
from benchmarks.contestants import plain_jax
from benchmarks.contestants.padded import pad
from palign.config.schema import LoraConfig, ModelConfig, OptimizerConfig
from palign.data.pack import pack_row, row_shape, stack_rows
from palign.models.hf import describe
from palign.models.lora import add_lora
from palign.models.transformer import make_language_model
from palign.objectives.base import REFERENCE
from palign.objectives.compose import make_objective
from palign.objectives.lora import with_base
from palign.sharding.mesh import make_mesh, row_sharding
from palign.sharding.rules import parameter_shardings
from palign.train.followers import EMA, Follower
from palign.train.optimizer import make_optimizer
from palign.train.state import new_state, state_shardings
from palign.train.step import make_train_step

TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MODEL = ModelConfig(
    vocab_size=32000, num_layers=12, dim=768, num_heads=12, num_key_heads=12, hidden_dim=2048, tie_embedding=False
)
MEBI = 2**20
PAIRS = 8
PLAIN, UNSHARED, PACKED = "plain JAX", "palign, unshared", "palign"
AIM = 12.0  # C7


@dataclasses.dataclass(frozen=True)
class Setting:
    """One line of the table."""

    remat: str = "full"
    state_dtype: str = "float32"
    frozen: str = "float32"
    micro_batches: int = 1
    cached: bool = False
    rank: int = 0
    followers: tuple[str, ...] = ()


SETTINGS = {
    "model.remat=full": Setting(),
    "model.remat=attention": Setting(remat="attention"),
    "model.remat=dots": Setting(remat="dots"),
    "model.remat=none": Setting(remat="none"),
    "data.micro_batches=4": Setting(micro_batches=4),
    "optimizer.state_dtype=bfloat16": Setting(state_dtype="bfloat16"),
    "frozen.dtype=bfloat16": Setting(frozen="bfloat16"),
    "objective.reference=cached": Setting(cached=True),
    "lora.rank=16": Setting(rank=16),
    "lora.rank=16, frozen.dtype=bfloat16": Setting(rank=16, frozen="bfloat16"),
    "train.ema_decay": Setting(followers=(EMA,)),
    "objective.reference_sync_every": Setting(followers=(REFERENCE,)),
}


def compile_step(setting: Setting, model: ModelConfig, mesh: Mesh, rows: int, tokens: int) -> tuple[Any, Any, Any]:
    """The compiled step, and the abstract state and frozen models that it takes."""
    lm = make_language_model(dataclasses.replace(model, remat=setting.remat))
    objective = make_objective(lm, ["dpo"], cached_reference=setting.cached)
    trained, lora = lm, LoraConfig(rank=setting.rank)
    if setting.rank:
        trained, objective = add_lora(lm, lora), with_base(objective, lora, objective.frozen)
    optimizer = OptimizerConfig(state_dtype=setting.state_dtype, warmup_steps=0, warmup_ratio=None)
    tx, followers = make_optimizer(optimizer, 1000), {role: Follower(1, 0.1) for role in setting.followers}
    whole = jax.eval_shape(lm.init, jax.random.key(0))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, setting.frozen), whole)
    aux = {role: frozen for role in objective.frozen - set(followers)}
    places = {role: parameter_shardings(mesh, frozen) for role in aux}
    params = jax.eval_shape(trained.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: new_state(p, tx, models=dict.fromkeys(followers, p)), params)
    shardings = state_shardings(mesh, trained, tx, roles=followers)
    step = make_train_step(objective, tx, mesh, shardings, places, followers)
    batch = _batch(mesh, rows, tokens, setting)
    with jax.set_mesh(mesh):
        compiled = step.compiled.lower(_placed(state, shardings), _placed(aux, places), batch).compile()
    return compiled, _placed(state, shardings), _placed(aux, places)


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _batch(mesh: Mesh, rows: int, tokens: int, setting: Setting) -> Any:
    shape = row_shape(tokens, trees=8, responses=2, block=128)
    batch = stack_rows([pack_row([], shape, "best_worst", "packed", seed=0)] * (rows // setting.micro_batches))
    if setting.cached:
        batch = batch._replace(reference_logps=np.zeros(batch.target_slot.shape, np.float32))
    place, parts = row_sharding(mesh, axis=1), setting.micro_batches
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((parts, *x.shape), x.dtype, sharding=place), batch)


def on_one_device(tree: Any) -> float:
    """MiB of one device's part."""
    leaves = jax.tree.leaves(tree)
    return sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves) / 2**20


def measure_settings(flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Compiles the step of every setting; MiB by setting."""
    devices, dtype = jax.devices()[:1], "float32"
    if flags.topology:
        from jax.experimental import topologies

        os.environ.update(TPU)
        topology = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology)
        devices, dtype = list(topology.devices), "bfloat16"
    mesh = make_mesh(data=1, fsdp=-1, devices=devices)
    model = dataclasses.replace(MODEL, dtype=dtype)
    found = {}
    for name, setting in SETTINGS.items():
        compiled, state, aux = compile_step(setting, model, mesh, flags.rows, flags.tokens)
        temporary = compiled.memory_analysis().temp_size_in_bytes / MEBI
        found[name] = {"state": on_one_device(state), "frozen": on_one_device(aux), "temporary": temporary}
        print(f"{name}: compiled", file=sys.stderr, flush=True)
    return found


def measure_pairs(flags: argparse.Namespace) -> list[dict[str, float]]:
    """MiB of temporaries of a step on 8 pairs of 2 x 512 tokens, by vocabulary."""
    length = 32 if flags.tiny else 256  # of a prompt, and of a response
    geometries = [cases.TINY] if flags.tiny else [cases.Geometry(vocabulary=size) for size in (32000, 128000)]
    mesh, found = make_mesh(data=1, devices=jax.devices()[:1]), []
    for geometry in geometries:
        pairs = cases.equal(PAIRS, length, length, vocabulary=geometry.vocabulary, rounds=1, seed=flags.seed)
        with cases.written(geometry, pairs) as case:
            plain = compile_plain(case, pairs[0]).memory_analysis().temp_size_in_bytes / MEBI
            model = describe(epath.Path(case)).model
        row: dict[str, float] = {"vocabulary": geometry.vocabulary, PLAIN: plain}
        for name, copies in ((UNSHARED, 4), (PACKED, 3)):
            tokens = -(-copies * length // 128) * 128
            compiled = compile_step(Setting(), model, mesh, PAIRS, tokens)[0]
            row[name] = compiled.memory_analysis().temp_size_in_bytes / MEBI
        found.append(row)
    return found


def compile_plain(case: pathlib.Path, pairs: Sequence[cases.Pair]) -> Any:
    """The plain JAX contestant's step on these pairs, not run."""
    init, step = plain_jax.make_step(json.loads((case / "config.json").read_text()))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), load_file(case / "model.safetensors"))
    return step.lower(params, jax.eval_shape(init, params), params, pad(pairs)).compile()


def tables(settings: dict[str, dict[str, float]], pairs: list[dict[str, float]]) -> str:
    """Both as Markdown."""
    lines = ["| setting | state | frozen | temporary |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(f'{x:,.0f}' for x in row.values())} |" for name, row in settings.items()]
    if pairs:
        names = (PLAIN, UNSHARED, PACKED)
        lines += ["", f"| V | {' | '.join(names)} | plain JAX / unshared, C7 |", "|---|---|---|---|---|"]
    for row in pairs:
        sizes = " | ".join(f"{row[name]:,.0f}" for name in names)
        lines.append(
            f"| {row['vocabulary']:,} | {sizes} | {row[PLAIN] / row[UNSHARED]:.1f}, at least {AIM:g} at 128,000 |"
        )
    return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="", help="TPU chips, for instance v5e:2x2; default: one CPU device")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)


def main() -> None:
    """Compiles every setting and both sides of the comparison."""
    flags = driver.parse(__doc__, rounds=1, add=add_flags)
    before = os.getloadavg()
    jax.config.update("jax_platforms", "cpu")
    if flags.tiny:
        flags.rows, flags.tokens = 4, 128
    settings, pairs = measure_settings(flags), [] if flags.topology else measure_pairs(flags)
    single.write("memory", flags, [], before, tables(settings, pairs), settings=settings, pairs=pairs)


if __name__ == "__main__":
    main()
