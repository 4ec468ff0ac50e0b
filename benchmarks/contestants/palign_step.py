"""palign as it trains: token trees packed into rows by the plan, attention by block pairs, the train step.

--layout=unshared       the prompt again before every response: the very work that the others do
--reference=cached      the reference's log-probabilities come with the batch
--method=aligndistil    on chosen responses, with the models of --teacher and --reverse
"""

import argparse
import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from benchmarks import cases
from benchmarks.contestants import distill_inputs
from benchmarks.worker import Done, serve
from palign.config.schema import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from palign.data.loader import Dataset
from palign.data.pack import RowShape, join_targets, pack_row, row_shape, split_targets, stack_rows
from palign.data.plan import plan_evaluation, row_needs
from palign.data.tokenize import TokenTree
from palign.heads.target_values import target_logps
from palign.models.hf import describe, load_weights
from palign.models.protocol import LanguageModel
from palign.models.transformer import make_language_model
from palign.objectives.base import REFERENCE
from palign.objectives.compose import make_objective
from palign.sharding.mesh import make_mesh, to_global
from palign.sharding.rules import parameter_shardings
from palign.train.kernel import choose_kernel
from palign.train.metrics import to_floats
from palign.train.optimizer import make_optimizer
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step
from palign.types import Batch

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
ALIGNDISTIL = {"beta0": distill_inputs.BETA0, "scale": distill_inputs.SCALE, "epsilon": distill_inputs.EPSILON}
HYPER = {"dpo": {"beta": cases.BETA}, "aligndistil": ALIGNDISTIL}
Reference = dict[int, tuple[np.ndarray, ...]]  # a tree's id -> log-probabilities of its responses' tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", type=pathlib.Path, required=True)
    parser.add_argument("--layout", choices=("packed", "unshared"), default="packed")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument("--method", choices=HYPER, default="dpo")
    parser.add_argument("--teacher", type=pathlib.Path, help="AlignDistil's DPO model")
    parser.add_argument("--reverse", type=pathlib.Path, help="AlignDistil's reverse DPO model")
    parser.add_argument("--block", type=int, default=DataConfig.block, help="tokens in a block of attention")
    parser.add_argument("--tokens", type=int, required=True, help="of a row")
    parser.add_argument("--rows", type=int, required=True, help="of a step")
    parser.add_argument("--remat", default=ModelConfig.remat)
    parser.add_argument("--chunk", type=int, default=ObjectiveConfig.head_chunk, help="targets per trip of the head")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    cached = flags.reference == "cached"
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    rounds = cases.read_rounds(flags.case)
    trees = as_trees(rounds, flags.method)
    shape = row_shape(flags.tokens, responses=len(trees[0][0].responses), block=flags.block)
    model = describe(epath.Path(flags.case)).model
    model = dataclasses.replace(model, remat=flags.remat, dtype=cases.read_dtype(flags.case))
    lm = make_language_model(model, choose_attention(model, mesh, trees[0], shape, flags))
    params = read_weights(flags.case, mesh, lm)
    reference = cache_reference(lm, params, mesh, trees, shape, flags) if cached else None
    objective = make_objective(
        lm, [flags.method], hyper=HYPER[flags.method], cached_reference=cached, chunk=flags.chunk
    )
    tx = make_optimizer(
        OptimizerConfig(
            learning_rate=cases.LEARNING_RATE,
            max_grad_norm=cases.MAX_GRAD_NORM,
            schedule="constant",
            warmup_ratio=0.0,
        ),
        1000,
    )
    aux = {
        role: params if role == REFERENCE else read_weights(vars(flags)[role], mesh, lm) for role in objective.frozen
    }
    aux_places = {role: parameter_shardings(mesh, shapes_of(lm)) for role in aux}
    step = make_train_step(objective, tx, mesh, state_shardings(mesh, lm, tx), aux_places)
    state = init_state(mesh, lm, tx, seed=0, params=params)
    planned = plan_bytes(step, mesh, state, aux, next(batches(trees[0], shape, flags, reference))[1])

    def take(index: int) -> Done:
        nonlocal state
        slots = updates = 0
        for _, batch in batches(trees[index], shape, flags, reference):
            state, metrics = step(state, aux, to_global(mesh, batch))
            slots, updates = slots + batch.token.size, updates + 1
        values = to_floats(jax.block_until_ready((state, metrics))[1])
        work = cases.work(rounds[index]) | {"slots": slots, "updates": updates} | planned
        return Done({name: values[name] for name in ("loss", "grad_norm")}, work, {"ids": cases.digest(rounds[index])})

    models = [each for each in (flags.case, flags.teacher, flags.reverse) if each]
    same = {"weights": ", ".join(map(cases.weights_digest, models))}
    serve(take, packages=PACKAGES, same=same, device=jax.devices()[0].device_kind, device_peak=device_peak)


def shapes_of(lm: LanguageModel) -> Any:
    return jax.eval_shape(lm.init, jax.random.key(0))


def read_weights(directory: pathlib.Path, mesh: Mesh, lm: LanguageModel) -> Any:
    shapes = shapes_of(lm)
    placed = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, parameter_shardings(mesh, shapes)
    )
    return load_weights(epath.Path(directory), placed)


def choose_attention(
    model: ModelConfig, mesh: Mesh, trees: Sequence[TokenTree], shape: RowShape, flags: argparse.Namespace
) -> str:
    """The form that a run would take on these devices and rows."""
    needs = row_needs(trees, layout=flags.layout, pair_policy="best_worst")
    plan = plan_evaluation(needs, shape, rows_per_step=flags.rows)
    with tempfile.TemporaryDirectory() as workdir:
        data = Dataset(trees, shape, plan, "best_worst", flags.layout, seed=0)
        return choose_kernel(RunConfig(model=model), epath.Path(workdir), mesh, data)


def plan_bytes(step: Any, mesh: Mesh, state: Any, aux: Any, batch: Batch) -> dict[str, int]:
    """On an accelerator, what the compiler says that the step needs of its memory."""
    if jax.default_backend() == "cpu":
        return {}
    with jax.set_mesh(mesh):
        memory = step.compiled.lower(state, aux, to_global(mesh, batch)).compile().memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"planned_bytes": kept + memory.temp_size_in_bytes}


def as_trees(rounds: Sequence[Sequence[cases.Pair]], method: str) -> list[list[TokenTree]]:
    """Each pair as a tree, numbered through all rounds; to distil, its chosen response."""
    number = itertools.count()

    def tree(pair: cases.Pair) -> TokenTree:
        if method == "dpo":
            return TokenTree(pair.prompt, (pair.chosen, pair.rejected), (1.0, 0.0), next(number))
        return TokenTree(pair.prompt, (pair.chosen,), (1.0,), next(number))

    return [[tree(pair) for pair in pairs] for pairs in rounds]


def batches(
    trees: Sequence[TokenTree], shape: RowShape, flags: argparse.Namespace, reference: Reference | None
) -> Iterator[tuple[list[list[TokenTree]], Batch]]:
    """The trees of every row, and the batch `[1, R, ...]`, of every step that it takes to go through the trees once."""
    needs = row_needs(trees, layout=flags.layout, pair_policy="best_worst")
    plan = plan_evaluation(needs, shape, rows_per_step=flags.rows)

    def pack(members: Sequence[TokenTree]) -> Batch:
        row = pack_row(members, shape, "best_worst", flags.layout, seed=0)
        if reference is None:
            return row
        values = [reference[tree.id] for tree in members]
        return row._replace(reference_logps=join_targets(row, values, like=np.zeros(0, np.float32)))

    for s in range(plan.num_steps):
        rows = [[trees[i] for i in plan.row(s * flags.rows + r)] for r in range(flags.rows)]
        yield rows, stack_rows([stack_rows([pack(members) for members in rows])])


def cache_reference(lm, params, mesh, trees, shape: RowShape, flags: argparse.Namespace) -> Reference:
    """What a run reads from its cache; not timed, as nobody's is."""

    @jax.jit
    def logps(params, batch):
        return target_logps(lm.hidden(params, batch), lm.unembed(params), batch, chunk=flags.chunk)

    found = {}
    for each in trees:
        for rows, batch in batches(each, shape, flags, None):
            placed = jax.tree.map(lambda x: x[0], to_global(mesh, batch))
            with jax.set_mesh(mesh):
                values = np.asarray(logps(params, placed))
            for r, members in enumerate(rows):
                split = split_targets(jax.tree.map(lambda x, r=r: x[0, r], batch), values[r])
                found |= {tree.id: parts for tree, parts in zip(members, split, strict=True)}
    return found


def device_peak() -> int | None:
    statistics = jax.devices()[0].memory_stats()
    return statistics and statistics.get("peak_bytes_in_use")


if __name__ == "__main__":
    main()
