"""Packed trees against pad-and-repeat: the whole DPO step, both sides in one process, stepped in turn.

    python benchmarks/packed_step.py                    # HH-like lengths, live reference
    python benchmarks/packed_step.py --cached           # the reference's log-probabilities come with the batch
    python benchmarks/packed_step.py --lengths=uf       # UltraFeedback-like lengths

Side A is palign as it trains: each prompt once, its two responses as branches, whole trees packed into rows by the
epoch plan, attention by block pairs. Side B is what other trainers do: chosen and rejected as two sequences, the prompt
repeated, padded to the longest of the batch, dense causal attention. Everything else is the same on both sides: the
transformer (rematerialised), the chunked head on response tokens only, the loss, optimizer and jitted step, the start,
and the pairs of every step. Loss and gradient norm must agree before a figure is printed.

Lengths are drawn from log-normals (sigma 0.8) around the medians of the data sets. Both sides take the same pairs per
step: as many as one packed batch holds. The baseline's padded length is rounded up to a multiple of 16; that it is
compiled anew for every shape costs it nothing here, since compilation is not timed. A ratio above 1: packed is faster.
"""

import argparse
import functools
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palign import losses
from palign.config.schema import ModelConfig, OptimizerConfig
from palign.data.pack import RowShape, join_targets, pack_row, row_shape, split_targets, stack_rows
from palign.data.plan import plan_epochs, row_needs
from palign.data.tokenize import TokenTree
from palign.heads.target_values import target_logps, token_values
from palign.models.transformer import Transformer, TreeContext, make_language_model
from palign.objectives.base import REFERENCE, Objective
from palign.objectives.compose import make_objective
from palign.objectives.methods import token_metrics
from palign.sharding.mesh import Mesh, make_mesh, to_global
from palign.sharding.rules import parameter_shardings
from palign.train.metrics import to_floats
from palign.train.optimizer import make_optimizer
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step
from palign.types import Batch, Terms

BETA, SIGMA, NEVER = 0.1, 0.8, -1e30
# Name -> median tokens of prompt, chosen and rejected; rows of a packed batch, so that it holds four to eight pairs.
LENGTHS = {"hh": ((119, 49, 49), 1), "uf": ((107, 272, 239), 3)}
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3  # absolute, relative
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Side(NamedTuple):
    """One contestant."""

    step: Callable
    aux: dict[str, Any]
    batches: list[Batch]  # of every step, `[A, R, ...]`, on the device


class Round(NamedTuple):
    """What one step of one side took and gave."""

    wall: float
    cpu: float
    loss: float
    grad_norm: float


def draw_trees(lengths: str, number: int, longest: int, vocabulary: int, seed: int) -> list[TokenTree]:
    """Pairs of random tokens; a prompt with one response has at most `longest` of them."""
    rng = np.random.default_rng(seed)
    trees = []
    for i in range(number):
        sizes = (np.array(LENGTHS[lengths][0]) * np.exp(SIGMA * rng.standard_normal(3))).astype(int)
        prompt = int(np.clip(sizes[0], 2, longest // 2))
        responses = np.clip(sizes[1:], 1, longest - prompt)
        draw = functools.partial(rng.integers, 0, vocabulary, dtype=np.int32)
        trees.append(TokenTree(draw(prompt), tuple(draw(int(n)) for n in responses), (1.0, 0.0), i))
    return trees


def packed_steps(trees: list[TokenTree], shape: RowShape, rows: int, steps: int) -> Iterator[list[list[TokenTree]]]:
    """The trees of every row of every step, by the epoch plan."""
    plan = plan_epochs(
        row_needs(trees, layout="packed", pair_policy="best_worst"), shape, rows_per_step=rows, seed=0, max_steps=steps
    )
    for s in range(steps):
        yield [[trees[i] for i in plan.row(s * rows + r)] for r in range(rows)]


def packed_batch(rows: list[list[TokenTree]], shape: RowShape, reference: dict | None) -> Batch:
    """Side A's batch `[R, ...]`."""

    def packed(trees):
        row = pack_row(trees, shape, "best_worst", "packed", seed=0)
        if reference is None:
            return row
        values = [reference[tree.id] for tree in trees]
        return row._replace(reference_logps=join_targets(row, values, like=np.zeros(0, np.float32)))

    return stack_rows([packed(trees) for trees in rows])


def padded_batch(trees: list[TokenTree], reference: dict | None) -> Batch:
    """Side B's batch: rows chosen, rejected, chosen, ...; prompt and one response, padded to the longest."""
    pairs = [(tree, k) for tree in trees for k in (0, 1)]
    longest = max(tree.prompt.size + tree.responses[k].size for tree, k in pairs)
    longest, targets = -(-longest // 16) * 16, max(tree.responses[k].size for tree, k in pairs)
    ids, table = np.zeros((2, len(pairs), longest), np.int32), np.zeros((3, len(pairs), targets), np.int32)
    logps = None if reference is None else np.zeros((len(pairs), targets), np.float32)
    for r, (tree, k) in enumerate(pairs):
        start, size = tree.prompt.size, tree.responses[k].size
        ids[0, r, : start + size] = np.concatenate([tree.prompt, tree.responses[k]])
        ids[1, r, : start + size] = 1
        table[0, r, :size] = np.arange(start - 1, start + size - 1)
        table[1, r, :size] = tree.responses[k]
        table[2, r, :size] = 1
        if logps is not None:
            logps[r, :size] = reference[tree.id][k]
    rows, unused = len(pairs), np.zeros((len(pairs), 1), np.int32)
    position = np.broadcast_to(np.arange(longest, dtype=np.int32), (rows, longest)).copy()
    return Batch(
        ids[0], position, ids[1], np.zeros_like(ids[0]), *table, unused, unused, unused, unused, unused, unused, logps
    )


def attend_causal(q, k, v, window, cache, context, *, scale, softcap):
    """Plain dense causal attention; padding is at the end, so no real query sees it."""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("rqhd,rkhd->rhqk", q, k, preferred_element_type=jnp.float32) * scale
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, NEVER), axis=-1).astype(v.dtype)
    return jnp.einsum("rhqk,rkhd->rqhd", weights, v), None


def pad_and_repeat_objective(lm, config: ModelConfig, *, cached: bool, chunk: int) -> Objective:
    """DPO on padded rows, with what `make_objective` computes for metrics."""

    def hidden(params, batch):
        context = TreeContext(batch.position, batch.group, batch.branch, batch.block_pairs)
        return Transformer(config, jnp.float32, attend_causal).apply({"params": params}, batch.token, context, None)[0]

    def sums(logps, batch):
        return jnp.sum(jnp.where(batch.target_slot > 0, logps, 0.0), axis=1).reshape(-1, 2)

    def loss(params, aux, batch, context):
        tokens = token_values(hidden(params, batch), lm.unembed(params), batch, chunk=chunk)
        reference = batch.reference_logps
        if not cached:
            frozen = jax.lax.stop_gradient(aux[REFERENCE])
            reference = target_logps(hidden(frozen, batch), lm.unembed(frozen), batch, chunk=chunk)
        values = losses.dpo(sums(tokens.logps, batch), jax.lax.stop_gradient(sums(reference, batch)), beta=BETA)
        return Terms({"dpo": jnp.sum(values)}, jax.lax.stop_gradient(token_metrics(tokens, batch)), {})

    def counts(batch):
        return {"dpo": jnp.float32(batch.token.shape[0] // 2)}

    return Objective({"dpo": 1.0}, frozenset() if cached else frozenset({REFERENCE}), counts, loss)


def cache_reference(lm, params, batches: list[Batch], rows: list[list[TokenTree]], chunk: int) -> dict:
    """Example -> log-probabilities of its responses' tokens under the reference."""
    compiled = jax.jit(lambda p, b: target_logps(lm.hidden(p, b), lm.unembed(p), b, chunk=chunk))
    found = {}
    for batch, members in zip(batches, rows, strict=True):
        values = np.asarray(compiled(params, batch))
        for r, row in enumerate(members):
            split = split_targets(jax.tree.map(lambda x, r=r: x[r], batch), values[r])
            found |= {tree.id: logps for tree, logps in zip(row, split, strict=True)}
    return found


def make_sides(flags: argparse.Namespace, config: ModelConfig, mesh: Mesh, steps) -> tuple[dict[str, Side], Callable]:
    """Both contestants over the same pairs, and what makes the state that both start from."""
    lm = make_language_model(config)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_ratio=0.0), 1000)
    params = jax.jit(lm.init)(jax.random.key(0))
    shape = row_shape(flags.tokens, responses=2)
    packed, reference = [packed_batch(rows, shape, None) for rows in steps], None
    if flags.cached:
        reference = cache_reference(lm, params, packed, steps, flags.chunk)
        packed = [packed_batch(rows, shape, reference) for rows in steps]
    padded = [padded_batch([tree for row in rows for tree in row], reference) for rows in steps]
    objectives = {
        "packed": make_objective(lm, ["dpo"], hyper={"beta": BETA}, cached_reference=flags.cached, chunk=flags.chunk),
        "padded": pad_and_repeat_objective(lm, config, cached=flags.cached, chunk=flags.chunk),
    }
    aux_shardings = {} if flags.cached else {REFERENCE: parameter_shardings(mesh, params)}
    aux = jax.device_put({} if flags.cached else {REFERENCE: params}, aux_shardings)
    sides = {}
    for (name, objective), batches in zip(objectives.items(), (packed, padded), strict=True):
        step = make_train_step(objective, tx, mesh, state_shardings(mesh, lm, tx), aux_shardings)
        placed = [to_global(mesh, jax.tree.map(lambda x: np.asarray(x)[None], batch)) for batch in batches]
        sides[name] = Side(step, aux, placed)
    return sides, lambda: init_state(mesh, lm, tx, seed=0, params=params)


def run_side(side: Side, state, which: int):
    """One step, timed until its results are there."""
    wall, cpu = time.perf_counter(), time.process_time()
    state, metrics = jax.block_until_ready(side.step(state, side.aux, side.batches[which]))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    values = to_floats(metrics)
    return state, Round(wall, cpu, values["loss"], values["grad_norm"])


def race(sides: dict[str, Side], fresh: Callable, passes: int) -> dict[str, list[Round]]:
    """Every side in turn at every step, in alternating order; the first pass compiles and is dropped."""
    states, rounds = {name: fresh() for name in sides}, {name: [] for name in sides}
    for done in range(passes + 1):
        for which in range(len(sides["packed"].batches)):
            order = list(sides) if (done + which) % 2 else list(sides)[::-1]
            for name in order:
                states[name], measured = run_side(sides[name], states[name], which)
                rounds[name].append(measured)
            check(rounds["packed"][-1], rounds["padded"][-1])
        print(f"pass {done} of {passes}{' (compiles, dropped)' if not done else ''}", file=sys.stderr, flush=True)
    return {name: measured[len(sides[name].batches) :] for name, measured in rounds.items()}


def check(one: Round, other: Round) -> None:
    """The precondition: both sides computed the same step."""
    same = abs(one.loss - other.loss) <= LOSS_TOLERANCE
    if not (same and abs(one.grad_norm / other.grad_norm - 1) <= NORM_TOLERANCE):
        raise SystemExit(f"the sides disagree, so no figure is printed: packed {one}, padded {other}")


def spread(values) -> str:
    """Min - median - max."""
    return f"{np.min(values):.2f} - {np.median(values):.2f} - {np.max(values):.2f}"


def report(flags: argparse.Namespace, sides: dict[str, Side], steps, rounds: dict[str, list[Round]]) -> None:
    """Prints the figures."""
    a, b = rounds["packed"], rounds["padded"]
    trees = [[tree for row in rows for tree in row] for rows in steps]
    pairs = np.tile([len(step) for step in trees], flags.passes)
    repeated = [sum(2 * tree.prompt.size + sum(r.size for r in tree.responses) for tree in step) for step in trees]
    worst = max(abs(x.loss - y.loss) for x, y in zip(a, b, strict=True))
    norm = max(abs(x.grad_norm / y.grad_norm - 1) for x, y in zip(a, b, strict=True))
    reference = "cached" if flags.cached else "live"
    size = f"{flags.layers} layers of width {flags.dim}, V {flags.vocabulary}"
    print(f"lengths {flags.lengths}, reference {reference}; {size}")
    print(f"{len(steps)} batches of {pairs.min()} to {pairs.max()} pairs, {flags.passes} passes")
    print(f"equal: loss to {worst:.1e}, gradient norm to {norm:.1e} (relative)")
    print("medians; tokens with prompts repeated\n          s/step  ms/pair  tokens/s  slots/step")
    for name, measured in rounds.items():
        wall = np.array([x.wall for x in measured])
        tokens = np.median(np.tile(repeated, flags.passes) / wall)
        slots = np.mean([batch.token.size for batch in sides[name].batches])
        print(f"{name:8}{np.median(wall):8.3f}{np.median(1e3 * wall / pairs):9.1f}{tokens:10,.0f}{slots:12,.0f}")
    for clock in ("wall", "cpu"):
        ratios = [getattr(y, clock) / getattr(x, clock) for x, y in zip(a, b, strict=True)]
        total = sum(getattr(y, clock) for y in b) / sum(getattr(x, clock) for x in a)
        print(f"padded / packed, {clock:4} seconds per pair: {spread(ratios)} (min - median - max), {total:.2f} in all")


def report_machine() -> None:
    """Prints what the figures depend on besides."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    platform_name = f"{jax.devices()[0].platform}, {os.cpu_count()} cores, load {load}"
    print(", ".join([*versions, f"Python {platform.python_version()}", platform_name]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--lengths", choices=LENGTHS, default="hh")
    parser.add_argument("--cached", action="store_true", help="reference log-probabilities come with the batch")
    parser.add_argument("--steps", type=int, default=5, help="different batches")
    parser.add_argument("--passes", type=int, default=2, help="timed passes over them")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=0, help="rows of a packed batch; 0: enough for four to eight pairs")
    parser.add_argument("--max-length", type=int, default=1024, help="most tokens of a prompt and one response")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--hidden-dim", type=int, default=688)
    parser.add_argument("--chunk", type=int, default=512, help="targets per trip of the head")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    flags = parse()
    config = ModelConfig(
        vocab_size=flags.vocabulary,
        num_layers=flags.layers,
        dim=flags.dim,
        num_heads=flags.heads,
        num_key_heads=flags.heads,
        hidden_dim=flags.hidden_dim,
        tie_embedding=False,
        dtype="float32",
    )
    trees = draw_trees(flags.lengths, 64, flags.max_length, flags.vocabulary, flags.seed)
    rows = flags.rows or LENGTHS[flags.lengths][1]
    steps = list(packed_steps(trees, row_shape(flags.tokens, responses=2), rows, flags.steps))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    sides, fresh = make_sides(flags, config, mesh, steps)
    report(flags, sides, steps, race(sides, fresh, flags.passes))
    report_machine()


if __name__ == "__main__":
    main()
