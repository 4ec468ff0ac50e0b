"""palign as it trains: token trees packed into rows by the plan, attention by block pairs, the train step.

--layout=unshared     the prompt again before every response: the very work that the others do
--reference=cached    the reference's log-probabilities come with the batch
"""

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath

from benchmarks import cases
from benchmarks.worker import Done, serve
from palign.config.schema import ModelConfig, ObjectiveConfig, OptimizerConfig
from palign.data.pack import RowShape, join_targets, pack_row, row_shape, split_targets, stack_rows
from palign.data.plan import plan_evaluation, row_needs
from palign.data.tokenize import TokenTree
from palign.heads.target_values import target_logps
from palign.models.hf import describe, load_weights
from palign.models.transformer import make_language_model
from palign.objectives.base import REFERENCE
from palign.objectives.compose import make_objective
from palign.sharding.mesh import make_mesh, to_global
from palign.sharding.rules import parameter_shardings
from palign.train.metrics import to_floats
from palign.train.optimizer import make_optimizer
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step
from palign.types import Batch

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
Reference = dict[int, tuple[np.ndarray, ...]]  # a tree's id -> log-probabilities of its responses' tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", type=pathlib.Path, required=True)
    parser.add_argument("--layout", choices=("packed", "unshared"), default="packed")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument("--tokens", type=int, required=True, help="of a row")
    parser.add_argument("--rows", type=int, required=True, help="of a step")
    parser.add_argument("--remat", default=ModelConfig.remat)
    parser.add_argument("--chunk", type=int, default=ObjectiveConfig.head_chunk, help="targets per trip of the head")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    cached = flags.reference == "cached"
    mesh, shape = make_mesh(data=1, devices=jax.devices()[:1]), row_shape(flags.tokens, responses=2)
    directory = epath.Path(flags.case)
    lm = make_language_model(dataclasses.replace(describe(directory).model, remat=flags.remat))
    places = parameter_shardings(mesh, jax.eval_shape(lm.init, jax.random.key(0)))
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    params = load_weights(
        directory, jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
    )
    rounds = cases.read_rounds(flags.case)
    trees = as_trees(rounds)
    reference = cache_reference(lm, params, mesh, trees, shape, flags) if cached else None
    objective = make_objective(lm, ["dpo"], hyper={"beta": cases.BETA}, cached_reference=cached, chunk=flags.chunk)
    tx = make_optimizer(
        OptimizerConfig(
            learning_rate=cases.LEARNING_RATE,
            max_grad_norm=cases.MAX_GRAD_NORM,
            schedule="constant",
            warmup_ratio=0.0,
        ),
        1000,
    )
    aux, aux_places = ({}, {}) if cached else ({REFERENCE: params}, {REFERENCE: places})
    step = make_train_step(objective, tx, mesh, state_shardings(mesh, lm, tx), aux_places)
    state = init_state(mesh, lm, tx, seed=0, params=params)

    def take(index: int) -> Done:
        nonlocal state
        slots = updates = 0
        for _, batch in batches(trees[index], shape, flags, reference):
            state, metrics = step(state, aux, to_global(mesh, batch))
            slots, updates = slots + batch.token.size, updates + 1
        values = to_floats(jax.block_until_ready((state, metrics))[1])
        work = cases.work(rounds[index]) | {"slots": slots, "updates": updates}
        return Done({name: values[name] for name in ("loss", "grad_norm")}, work, {"ids": cases.digest(rounds[index])})

    same = {"weights": cases.weights_digest(flags.case)}
    serve(take, packages=PACKAGES, same=same, device=jax.devices()[0].device_kind, device_peak=device_peak)


def as_trees(rounds: Sequence[Sequence[cases.Pair]]) -> list[list[TokenTree]]:
    """Each pair as a tree, numbered through all rounds."""
    number = itertools.count()
    return [
        [TokenTree(pair.prompt, (pair.chosen, pair.rejected), (1.0, 0.0), next(number)) for pair in pairs]
        for pairs in rounds
    ]


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
