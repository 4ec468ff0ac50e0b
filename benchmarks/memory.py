"""What each memory setting saves: the DPO step compiled, nothing run, its memory read from the compiled program.

    python benchmarks/memory.py                               # for this machine's processor
    python benchmarks/memory.py --topology=v5e:2x2            # for TPU chips, with libtpu but without a TPU

Each line is the first line with one setting changed. State: parameters, optimizer, models that follow. Frozen: the
reference, or the base under LoRA factors. Temporary: everything that lives within a step. MiB of one device.
"""

import argparse
import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from palign.config.schema import LoraConfig, ModelConfig, OptimizerConfig
from palign.data.pack import pack_row, row_shape, stack_rows
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


def main() -> None:
    """Compiles every setting and prints its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="", help="TPU chips, for instance v5e:2x2; default: one CPU device")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    devices, dtype = jax.devices()[:1], "float32"
    if flags.topology:
        from jax.experimental import topologies

        os.environ.update(TPU)
        topology = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology)
        devices, dtype = list(topology.devices), "bfloat16"
    mesh = make_mesh(data=1, fsdp=-1, devices=devices)
    model = dataclasses.replace(MODEL, dtype=dtype)
    print(
        f"{len(devices)} x {devices[0].device_kind}, {flags.rows} rows of {flags.tokens} tokens, computing in {dtype}"
    )
    print("| setting | state | frozen | temporary |\n|---|---|---|---|")
    for name, setting in SETTINGS.items():
        compiled, state, aux = compile_step(setting, model, mesh, flags.rows, flags.tokens)
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
        print(f"| `{name}` | {on_one_device(state):,.0f} | {on_one_device(aux):,.0f} | {temporary:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
