"""Where the time of a DPO step goes: its parts, each beside what the machine can do.

    python -m benchmarks.profile_step                     # two pairs of 256 + 256 tokens, the prompt repeated
    python -m benchmarks.profile_step --layout=packed     # the prompt once
    python -m benchmarks.profile_step --lengths=uf --row-length=2048 --layout=packed

All parts take turns in one process: CPU seconds on a pinned core, wall seconds on an accelerator; medians. Each is
compared with two rates that are measured in the same rounds: of the step's own matrix products, by shape, and of adding
to an array in place. FLOPs are useful ones: what the method asks for (`palign.plan.cost`), nothing that is padded or
computed again. Bytes are what must pass through memory at least. "rest" is the step less the reference, body and head
forward and backward, and the optimizer; the input is made beside the step, by other threads.

C10: the step's useful FLOPs in a second, over the rate of the products, should be 50% or more.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cases, driver, single
from palign.attention.attend import KERNELS, attend
from palign.config.schema import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from palign.data.loader import Dataset, batches
from palign.data.pack import row_shape
from palign.data.plan import plan_epochs, plan_evaluation, row_needs
from palign.data.tokenize import TokenTree
from palign.heads.target_values import target_logps, token_values
from palign.models.config import NO_WINDOW, compute_dtype
from palign.models.transformer import make_language_model
from palign.objectives.base import REFERENCE
from palign.objectives.compose import make_objective
from palign.plan.cost import Forward, forward_of, layer_products, layer_values
from palign.sharding.mesh import make_mesh, to_global
from palign.sharding.rules import parameter_shardings
from palign.train.optimizer import global_norm, make_optimizer
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step

GOAL = 0.5  # C10
DROPPED = 2  # rounds
PRODUCTS, MEMORY, STEP = "matrix products", "memory", "step"
PARTS_OF_STEP = ("reference", "body, forward and backward", "head, forward and backward", "optimizer")


class Part(NamedTuple):
    """What is timed."""

    run: Callable[[], Any]  # gives what to wait for
    flops: float = 0.0
    bytes: float = 0.0


class Setup(NamedTuple):
    """The step and what goes into it."""

    model: ModelConfig
    mesh: jax.sharding.Mesh
    lm: Any
    data: Dataset
    params: Any
    places: Any
    chunk: int
    kernel: str


def main() -> None:
    flags = driver.parse(__doc__, rounds=7, add=add_flags)
    before = os.getloadavg()
    cores = driver.choose_cores(flags.cores)
    os.sched_setaffinity(0, cores)  # before XLA starts its threads
    setup = prepare(flags)
    host = setup.data.step_batch(0, micro_batches=1)
    parts = make_parts(setup, host)
    products = list_products(setup.model, host, setup.chunk)
    raced = parts | {MEMORY: add_in_place()} | {str(shape): multiply(shape, setup.model) for shape in products}
    on_cpu = jax.devices()[0].platform == "cpu"
    seconds = race(raced, flags.rounds, time.process_time if on_cpu else time.perf_counter)
    rounds = {name: seconds[name] for name in (*parts, MEMORY)}
    rounds[PRODUCTS] = [sum(n * seconds[str(shape)][r] for shape, n in products.items()) for r in range(flags.rounds)]
    all_products = Part(lambda: None, flops=sum(2.0 * np.prod(shape) * n for shape, n in products.items()))
    table, share = tabulate(parts | {MEMORY: raced[MEMORY], PRODUCTS: all_products}, rounds)
    waited = measure_waits(setup, flags.rounds)
    counted = {name: int(np.sum(found)) for name, found in counts(host).items()}
    told = (
        f"C10: {share:.0%} of the rate of its matrix products, goal {GOAL:.0%}: {'met' if share >= GOAL else 'missed'}"
    )
    sizes = ", ".join(f"{value:,} {name}" for name, value in counted.items())
    title = f"**A DPO step** ({sizes}; medians of {flags.rounds} rounds; {jax.devices()[0].device_kind})"
    single.write(
        "profile_step",
        flags,
        cores,
        before,
        f"{title}\n\n{table}\n\n{told}\n\n{describe_waits(waited)}",
        device=jax.devices()[0].device_kind,
        counts=counted,
        seconds=rounds,
        flops={name: part.flops for name, part in parts.items()} | {PRODUCTS: all_products.flops},
        bytes={name: part.bytes for name, part in parts.items()} | {MEMORY: raced[MEMORY].bytes},
        waits=waited,
        goals=[{"id": "C10", "share": share, "at_least": GOAL, "met": bool(share >= GOAL)}],
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=2, help="of a step, where all have one length")
    parser.add_argument("--lengths", choices=("equal", *cases.LENGTHS), default="equal")
    parser.add_argument("--layout", choices=("packed", "unshared"), default="unshared")
    parser.add_argument("--row-length", type=int, default=1024, help="tokens")
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--block", type=int, default=DataConfig.block, help="of attention")
    parser.add_argument("--chunk", type=int, default=ObjectiveConfig.head_chunk, help="targets per trip of the head")
    parser.add_argument("--remat", default=ModelConfig.remat)
    parser.add_argument("--kernel", default="xla", help="form of attention")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--hidden-dim", type=int, default=688)
    parser.add_argument("--vocabulary", type=int, default=32000)


def prepare(flags: argparse.Namespace) -> Setup:
    """The model with random weights, and the rows of the pairs."""
    if flags.tiny:
        sizes = dict(zip(("vocabulary", "dim", "layers", "heads", "hidden_dim"), cases.TINY, strict=True))
        vars(flags).update(sizes, row_length=128)
    model = ModelConfig(
        vocab_size=flags.vocabulary,
        dim=flags.dim,
        num_layers=flags.layers,
        num_heads=flags.heads,
        num_key_heads=flags.heads,
        hidden_dim=flags.hidden_dim,
        tie_embedding=False,
        remat=flags.remat,
    )
    mesh, lm = make_mesh(data=1, devices=jax.devices()[:1]), make_language_model(model, flags.kernel)
    places = parameter_shardings(mesh, jax.eval_shape(lm.init, jax.random.key(0)))
    params = jax.jit(lm.init, out_shardings=places)(jax.random.key(0))
    return Setup(model, mesh, lm, make_data(flags), params, places, flags.chunk, flags.kernel)


def make_data(flags: argparse.Namespace) -> Dataset:
    """Pairs of one length, or of realistic ones, as many as the first step's rows hold."""
    draw = functools.partial(cases.equal, vocabulary=flags.vocabulary, rounds=1, seed=flags.seed)
    if flags.lengths == "equal":
        part = flags.row_length // 4
        pairs = draw(flags.pairs, part, part)[0]
    else:
        longest, room = flags.row_length // 2, flags.rows * flags.row_length
        pairs = cases.realistic(
            flags.lengths, 64, longest=longest, first=(64, room), vocabulary=flags.vocabulary, rounds=2, seed=flags.seed
        )[1]
    trees = [TokenTree(pair.prompt, (pair.chosen, pair.rejected), (1.0, 0.0), i) for i, pair in enumerate(pairs)]
    shape = row_shape(flags.row_length, responses=2, block=flags.block)
    needs = row_needs(trees, layout=flags.layout, pair_policy="best_worst")
    plan = plan_evaluation(needs, shape, rows_per_step=flags.rows)
    return Dataset(trees, shape, plan, "best_worst", flags.layout, flags.seed)


def make_parts(setup: Setup, host: Any) -> dict[str, Part]:
    """The step and its parts, each with its useful FLOPs and least bytes."""
    model, size = setup.model, compute_dtype(setup.model).itemsize
    forward, tokens, targets = forward_of(model, host), host.token.size, int(np.sum(host.target_slot > 0))
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(setup.params))
    layers, kernel = size * layer_products(model), size * model.dim * model.vocab_size
    body = layers + size * model.num_layers * layer_values(model) * tokens
    attended = size * model.num_layers * 4 * model.num_heads * model.head_width * tokens
    head = kernel + size * model.dim * targets
    runs = make_runs(setup, host)
    amounts = _amounts(forward, body, attended, head, weights)
    amounts["input"] = (0.0, float(sum(leaf.nbytes for leaf in jax.tree.leaves(host))))
    return {name: Part(run, *amounts[name]) for name, run in runs.items()}


def _amounts(
    forward: Forward, body: float, attended: float, head: float, weights: float
) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes by part; a backward is twice a forward, the optimizer reads and writes 9 times the weights."""
    layers = forward.layers + forward.attention
    return {
        STEP: (4 * (layers + forward.head), 4 * (body + head) + 9 * weights),
        "reference": (layers + forward.head, body + head),
        "body, forward": (layers, body),
        "body, forward and backward": (3 * layers, 3 * body),
        "attention, forward": (forward.attention, attended),
        "attention, forward and backward": (3 * forward.attention, 3 * attended),
        "head, forward": (forward.head, head),
        "head, forward and backward": (3 * forward.head, 3 * head),
        "optimizer": (0.0, 9 * weights),  # norm: gradient; update: gradient, parameter and moments in, the three out
    }


def make_runs(setup: Setup, host: Any) -> dict[str, Callable[[], Any]]:
    """What is run for each part."""
    lm, params, chunk = setup.lm, setup.params, setup.chunk
    rows = jax.tree.map(lambda leaf: leaf[0], to_global(setup.mesh, host))
    tokens = (rows.position, rows.group, rows.branch, rows.block_pairs, NO_WINDOW)
    scale, dtype = setup.model.head_width**-0.5, compute_dtype(setup.model)
    shape = (*rows.token.shape, setup.model.num_heads, setup.model.head_width)
    heads = jax.random.normal(jax.random.key(1), shape, dtype)

    def body(params):
        return lm.hidden(params, rows)

    def attention(query, key, value):
        return attend(query, key, value, *tokens, scale=scale, kernel=KERNELS[setup.kernel])

    def head(hidden, params):
        return token_values(hidden, lm.unembed(params), rows, chunk=chunk)

    def reference(params):
        return target_logps(lm.hidden(params, rows), lm.unembed(params), rows, chunk=chunk)

    in_mesh = functools.partial(_in_mesh, setup.mesh)
    hidden = in_mesh(jax.jit(body))(params)
    layers = range(setup.model.num_layers)
    attend_forward, attend_both = in_mesh(jax.jit(attention)), in_mesh(both(attention))
    body_forward, body_both = in_mesh(jax.jit(body)), in_mesh(both(body))
    head_forward, head_both = in_mesh(jax.jit(head)), in_mesh(both(head))
    reference_forward = in_mesh(jax.jit(reference))
    return {
        STEP: functools.partial(make_step(setup), to_global(setup.mesh, host)),
        "reference": lambda: reference_forward(params),
        "body, forward": lambda: body_forward(params),
        "body, forward and backward": lambda: body_both(params),
        "attention, forward": lambda: [attend_forward(heads, heads, heads) for _ in layers],
        "attention, forward and backward": lambda: [attend_both(heads, heads, heads) for _ in layers],
        "head, forward": lambda: head_forward(hidden, params),
        "head, forward and backward": lambda: head_both(hidden, params),
        "optimizer": make_update(setup),
        "input": lambda: to_global(setup.mesh, setup.data.step_batch(0, micro_batches=1)),
    }


def both(function: Callable) -> Callable:
    """Forward and backward, jitted; the first result is pulled back with itself for cotangent, others with zeros."""

    def run(*arguments):
        out, pull = jax.vjp(function, *arguments)
        first, *others = jax.tree.leaves(out)
        cotangent = jax.tree.unflatten(jax.tree.structure(out), [first, *map(jnp.zeros_like, others)])
        return out, pull(cotangent)

    return jax.jit(run)


def _in_mesh(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    def call(*arguments):
        with jax.set_mesh(mesh):
            return function(*arguments)

    return call


def optimizer() -> optax.GradientTransformation:
    constant = OptimizerConfig(learning_rate=cases.LEARNING_RATE, schedule="constant", warmup_ratio=0.0)
    return make_optimizer(constant, 1000)


def make_step(setup: Setup) -> Callable[[Any], Any]:
    """The training step, with a live reference, on a state that goes on."""
    objective = make_objective(setup.lm, ["dpo"], hyper={"beta": cases.BETA}, chunk=setup.chunk)
    tx = optimizer()
    shardings = state_shardings(setup.mesh, setup.lm, tx)
    step = make_train_step(objective, tx, setup.mesh, shardings, {REFERENCE: setup.places})
    state = init_state(setup.mesh, setup.lm, tx, seed=0, params=setup.params)

    def run(batch):
        nonlocal state
        state, metrics = step(state, {REFERENCE: setup.params}, batch)
        return state, metrics

    return run


def make_update(setup: Setup) -> Callable[[], Any]:
    """The gradient's norm and the optimizer, as the step runs them."""
    tx = optimizer()
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), setup.params)
    params, opt_state = jax.tree.map(jnp.copy, setup.params), tx.init(setup.params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, gradient):
        norm = global_norm(gradient)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, norm

    def run():
        nonlocal params, opt_state
        params, opt_state, norm = update(params, opt_state, gradient)
        return params, opt_state, norm

    return run


def measure_waits(setup: Setup, rounds: int) -> dict[str, list[float]]:
    """Steps on rows that the loader makes ahead, as a run takes them: wall seconds of each, and before each.

    Nothing where grain is missing, which makes them ahead.
    """
    try:
        import grain  # noqa: F401
    except ModuleNotFoundError:
        return {}
    data = setup.data
    needs = row_needs(data.trees, layout=data.layout, pair_policy=data.pair_policy)
    plan = plan_epochs(needs, data.shape, rows_per_step=data.plan.rows_per_step, seed=0, max_steps=rounds + DROPPED)
    found: dict[str, list[float]] = {"waiting for rows": [], "placing them": [], STEP: []}
    run = make_step(setup)
    with contextlib.closing(batches(dataclasses.replace(data, plan=plan), start_step=0, micro_batches=1)) as steps:
        start = time.perf_counter()
        for _, host in steps:
            times = [start, time.perf_counter()]
            batch = to_global(setup.mesh, host)
            times.append(time.perf_counter())
            jax.block_until_ready(run(batch))
            times.append(start := time.perf_counter())
            for name, begin, end in zip(found, times, times[1:], strict=False):
                found[name].append(end - begin)
    return {name: taken[DROPPED:] for name, taken in found.items()}


def describe_waits(waited: Mapping[str, list[float]]) -> str:
    if not waited:
        return "Whether a step waits for its rows was not measured: grain is not installed."
    told = ", ".join(f"{1e3 * statistics.median(taken):.2f} ms {name}" for name, taken in waited.items())
    share = statistics.median(waited["waiting for rows"]) / statistics.median(waited[STEP])
    return f"On rows made ahead, wall: {told}: {share:.2%} of a step is spent waiting."


def list_products(model: ModelConfig, host: Any, chunk: int) -> dict[tuple[int, int, int], float]:
    """The useful products of a step, (rows, summed over, columns) -> how often: attention's left out.

    A product of the forward pass has two in the backward, of the same size in another shape; the reference has one more
    forward. The head's are of a chunk.
    """
    tokens, (d, f, v) = int(np.sum(host.group > 0)), (model.dim, model.hidden_dim, model.vocab_size)
    trips = int(np.sum(host.target_slot > 0)) / chunk
    per_layer = {(d, model.num_heads * model.head_width): 4, (d, f): 2, (f, d): 1}
    found: dict[tuple[int, int, int], float] = {}

    def add(m, k, n, times):
        for shape, passes in (((m, k, n), 2), ((m, n, k), 1), ((k, m, n), 1)):  # forward; to the input; to the weights
            found[shape] = found.get(shape, 0) + times * passes

    for (k, n), times in per_layer.items():
        add(tokens, k, n, times * model.num_layers)
    add(chunk, d, v, trips)
    return found


def multiply(shape: tuple[int, int, int], model: ModelConfig) -> Part:
    m, k, n = shape
    dtype = compute_dtype(model)
    left, right = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return Part(lambda: product(left, right), flops=2.0 * m * k * n)


def add_in_place() -> Part:
    """The rate of memory: an array larger than any cache, read and written."""
    array = jnp.zeros(2**25, jnp.float32)
    add = jax.jit(lambda array: array + 1, donate_argnums=0)

    def run():
        nonlocal array
        array = add(array)
        return array

    return Part(run, bytes=2.0 * array.nbytes)


def race(parts: Mapping[str, Part], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every part in every round, in alternating order. Two rounds come before: compile, and settle."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for i in range(DROPPED + rounds):
        for name in parts if i % 2 else reversed(parts):
            start = clock()
            jax.block_until_ready(parts[name].run())
            seconds[name].append(clock() - start)
    return {name: taken[DROPPED:] for name, taken in seconds.items()}


def tabulate(parts: Mapping[str, Part], rounds: Mapping[str, list[float]]) -> tuple[str, float]:
    """The table, and the share of the products' rate that the step's useful FLOPs reach: the median over the rounds."""

    def shares(name, amount, ceiling):
        per_round = zip(rounds[name], rounds[ceiling], strict=True)
        most = getattr(parts[ceiling], amount)
        return statistics.median(getattr(parts[name], amount) / own * other / most for own, other in per_round)

    rows = [
        f"| part | ms | of the step | useful GFLOP | MB | of {PRODUCTS} | of {MEMORY} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        taken = statistics.median(rounds[name])
        of_step = statistics.median(own / whole for own, whole in zip(rounds[name], rounds[STEP], strict=True))
        flops = f"{part.flops / 1e9:.1f} | {part.bytes / 1e6:,.0f}"
        of = f"{shares(name, 'flops', PRODUCTS):.0%} | {shares(name, 'bytes', MEMORY):.0%}"
        rows.append(f"| {name} | {1e3 * taken:.1f} | {of_step:.1%} | {flops} | {of} |")
    sums = [sum(rounds[name][r] for name in PARTS_OF_STEP) for r in range(len(rounds[STEP]))]
    left = [whole - parts for whole, parts in zip(rounds[STEP], sums, strict=True)]
    share = statistics.median(rest / whole for rest, whole in zip(left, rounds[STEP], strict=True))
    rows.append(f"| rest | {1e3 * statistics.median(left):.1f} | {share:.1%} | | | | |")
    return "\n".join(rows), shares(STEP, "flops", PRODUCTS)


def counts(host: Any) -> dict[str, np.ndarray]:
    """What the rows hold, padding apart."""
    return {
        "tokens": host.group > 0,
        "slots": np.ones(host.group.shape, bool),
        "targets": host.target_slot > 0,
        "block pairs": host.block_pairs[..., 1] >= 0,
    }


if __name__ == "__main__":
    main()
