"""palign's DPO step compiled, with a persistent cache that may hold it, and then taken through an epoch.

Round 0 compiles. The number of programs compiled so far comes with every answer.
"""

import argparse
import pathlib
import time

import jax
import numpy as np

from benchmarks import cases
from benchmarks.contestants.palign_step import PACKAGES, as_trees
from benchmarks.worker import Done, serve
from palign.config.schema import ModelConfig, OptimizerConfig
from palign.data.loader import Dataset
from palign.data.pack import row_shape
from palign.data.plan import plan_epochs, row_needs
from palign.models.transformer import make_language_model
from palign.objectives.base import REFERENCE
from palign.objectives.compose import make_objective
from palign.sharding.mesh import make_mesh, to_global
from palign.sharding.rules import parameter_shardings
from palign.train.metrics import to_floats
from palign.train.optimizer import make_optimizer
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step

COMPILED = "/jax/core/compile/backend_compile_duration"  # one event a program, read from the cache or not


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--geometry", type=int, nargs=5, required=True, help="as cases.Geometry")
    parser.add_argument("--tokens", type=int, required=True, help="of a row")
    parser.add_argument("--rows", type=int, required=True, help="of a step")
    parser.add_argument("--pairs", type=int, required=True, help="of the epoch, of realistic lengths")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_data(flags: argparse.Namespace, vocabulary: int) -> Dataset:
    pairs = cases.realistic(
        "uf",
        flags.pairs,
        longest=flags.tokens // 2,
        first=(flags.pairs, flags.tokens),
        vocabulary=vocabulary,
        rounds=2,
        seed=flags.seed,
    )[1]
    (trees,), shape = as_trees([pairs], "dpo"), row_shape(flags.tokens, responses=2)
    needs = row_needs(trees, layout="packed", pair_policy="best_worst")
    plan = plan_epochs(needs, shape, epochs=1, rows_per_step=flags.rows, seed=flags.seed)
    return Dataset(trees, shape, plan, "best_worst", "packed", flags.seed)


def main() -> None:
    flags = parse()
    jax.config.update("jax_compilation_cache_dir", str(flags.cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event == COMPILED else None
    )
    g = cases.Geometry(*flags.geometry)
    sizes = dict(dim=g.width, num_layers=g.layers, num_heads=g.heads, num_key_heads=g.heads, hidden_dim=g.hidden)
    lm = make_language_model(ModelConfig(vocab_size=g.vocabulary, tie_embedding=False, **sizes))
    mesh, data = make_mesh(data=1, devices=jax.devices()[:1]), make_data(flags, g.vocabulary)
    places = parameter_shardings(mesh, jax.eval_shape(lm.init, jax.random.key(0)))
    constant = OptimizerConfig(learning_rate=cases.LEARNING_RATE, schedule="constant", warmup_ratio=0.0)
    tx = make_optimizer(constant, data.num_steps)
    objective = make_objective(lm, ["dpo"], hyper={"beta": cases.BETA})
    step = make_train_step(objective, tx, mesh, state_shardings(mesh, lm, tx), {REFERENCE: places})
    state = init_state(mesh, lm, tx, seed=0)
    aux = {REFERENCE: jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), state.params)}

    def take(index: int) -> Done:
        nonlocal state
        host = data.step_batch(index % data.num_steps, micro_batches=1)
        batch, values = to_global(mesh, host), {}
        if index == 0:
            wall, cpu = time.perf_counter(), time.process_time()
            with jax.set_mesh(mesh):
                traced = step.compiled.lower(state, aux, batch)
            values |= {"trace_cpu": time.process_time() - cpu, "trace_wall": time.perf_counter() - wall}
            wall, cpu = time.perf_counter(), time.process_time()
            traced.compile()
            values |= {"compile_cpu": time.process_time() - cpu, "compile_wall": time.perf_counter() - wall}
        else:
            state, metrics = step(state, aux, batch)
            values["loss"] = to_floats(metrics)["loss"]
        values |= {"compiled": len(compiled), "steps": data.num_steps}
        return Done(values, {"targets": int(np.sum(host.target_slot > 0))}, {})

    serve(take, packages=PACKAGES, same={})


if __name__ == "__main__":
    main()
