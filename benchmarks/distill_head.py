"""The fused divergence head against full logits: AlignDistil's loss and gradient, all sides in one process, in turn.

    python benchmarks/distill_head.py                           # three vocabularies; minutes
    python benchmarks/distill_head.py --vocab=32000 --rounds=3
    python benchmarks/distill_head.py --width=1024

Hidden states of a student, a DPO model and a reverse DPO model at T targets, and their unembeddings, go in; the mean
loss and its gradients with respect to the student's two come out. The sides:

    fused      palign's head: chunks of targets, the gradient taken in the forward pass.
    dense      `losses.aligndistil` on full `[T, V]` logits of all models, differentiated by `jax.grad`. It shares the
               fused head's closed forms, so the ratio is that of the chunks alone.
    textbook   the same formulas as one writes them down, with `jax.nn.log_softmax` and automatic differentiation.
    torch      the same in PyTorch, with the official formulas (L1 distance, r = scale / 2), where it is installed.

Loss and gradient norms must agree before a figure is printed. Temporary memory of the JAX sides is what the compiler
plans, at `--plan-targets`, without running: full logits of that many targets may not fit the machine. Peak memory is
measured at `--targets`, each side alone in a process of its own: the operating system's peak of resident memory less
what was resident before the run, results included (Linux). A ratio above 1: fused is faster.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palign import losses
from palign.heads.targets import Tower
from palign.heads.weighted_sum import weighted_sum
from palign.types import Batch, Unembedding

try:
    import torch
except ImportError:
    torch = None

BETA0, SCALE, EPSILON = 0.1, 20.0, 1e-3
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-3  # both relative
PACKAGES = ("jax", "jaxlib", "numpy", "torch")
STATUS, RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


class Round(NamedTuple):
    """What one run of one side took and gave."""

    wall: float
    cpu: float
    numbers: tuple[float, float, float]  # loss, norms of the two gradients


class Inputs(NamedTuple):
    """Hidden states `[T, D]` and kernels `[D, V]`: student, DPO model, reverse DPO model."""

    hidden: tuple[Any, ...]
    kernels: tuple[Any, ...]


def draw_inputs(targets: int, width: int, vocab: int) -> Inputs:
    """Three models that are alike, as three that come from one."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    hidden = jax.random.normal(next(keys), (targets, width))
    kernel = 2 / width**0.5 * jax.random.normal(next(keys), (width, vocab))
    others = [hidden + 0.3 * jax.random.normal(next(keys), hidden.shape) for _ in range(2)]
    kernels = [kernel + 0.1 / width**0.5 * jax.random.normal(next(keys), kernel.shape) for _ in range(2)]
    return jax.block_until_ready(Inputs((hidden, *others), (kernel, *kernels)))


def abstract_inputs(targets: int, width: int, vocab: int) -> Inputs:
    hidden, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((targets, width), (width, vocab)))
    return Inputs((hidden,) * 3, (kernel,) * 3)


def all_targets(targets: int) -> Batch:
    """One row of which every position predicts a token of one response."""
    unused, place = np.zeros((1, 1), np.int32), np.arange(targets, dtype=np.int32)[None]
    return Batch(*(unused,) * 4, place, np.zeros_like(place), np.ones_like(place), *(unused,) * 6)


def fused(x, w, frozen: Inputs, *, chunk: int):
    batch = jax.tree.map(jnp.asarray, all_targets(x.shape[0]))
    pairs = zip((x, *frozen.hidden[1:]), (w, *frozen.kernels[1:]), strict=True)
    towers = tuple(Tower(h[None], Unembedding(k, None, k.shape[1])) for h, k in pairs)
    weights = jnp.full(batch.target_slot.shape, 1 / x.shape[0])

    def at_targets(token, *logits):
        return losses.aligndistil(*logits, beta0=BETA0, scale=SCALE, epsilon=EPSILON), ()

    return weighted_sum(at_targets, weights, towers, batch, chunk=chunk)[0]


def dense(x, w, frozen: Inputs):
    logits = [h @ k for h, k in zip((x, *frozen.hidden[1:]), (w, *frozen.kernels[1:]), strict=True)]
    return jnp.mean(losses.aligndistil(*logits, beta0=BETA0, scale=SCALE, epsilon=EPSILON))


def textbook(x, w, frozen: Inputs):
    dpo, reverse = (h @ k for h, k in zip(frozen.hidden[1:], frozen.kernels[1:], strict=True))
    distance = 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(dpo) - jax.nn.softmax(reverse)), axis=-1)
    alpha = SCALE * distance + EPSILON
    teacher = jax.nn.log_softmax(dpo + alpha[:, None] * (dpo - reverse))
    student = jax.nn.log_softmax(x @ w)
    return jnp.mean(BETA0 / alpha * jnp.sum(jnp.exp(student) * (student - teacher), axis=-1))


def official_in_torch(inputs: Inputs) -> Callable[[], tuple[Any, Any, Any]]:
    """The official trainer's formulas for AlignDistil, on tensors that hold the same numbers."""
    torch.set_num_threads(os.cpu_count() or 1)  # as many as XLA takes
    hidden, kernels = ([torch.from_numpy(np.array(x)) for x in group] for group in inputs)
    x, w = hidden[0].requires_grad_(), kernels[0].requires_grad_()
    r = SCALE / 2

    def step():
        x.grad = w.grad = None
        student = x @ w
        with torch.no_grad():
            teacher, reverse = hidden[1] @ kernels[1], hidden[2] @ kernels[2]
            distance = (torch.softmax(teacher, -1) - torch.softmax(reverse, -1)).abs().sum(-1)
            weight = r * distance + EPSILON
            target = torch.log_softmax(weight[:, None] * (teacher - reverse) + teacher, -1)
        logps = torch.log_softmax(student, -1)
        kl = (logps.exp() * (logps - target)).sum(-1)
        loss = (kl * BETA0 / weight).mean()
        loss.backward()
        return loss.detach(), x.grad, w.grad

    return step


def jax_side(function: Callable, inputs: Inputs) -> Callable:
    """Compiles value and gradients for these shapes."""
    both = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    return both.lower(inputs.hidden[0], inputs.kernels[0], inputs).compile()


def names_of_sides(flags: argparse.Namespace) -> list[str]:
    return [*jax_functions(flags), *(["torch"] if torch else [])]


def make_side(flags: argparse.Namespace, inputs: Inputs, name: str) -> Callable[[], tuple[Any, Any, Any]]:
    """What computes loss and both gradients; a JAX side is compiled here."""
    if name == "torch":
        return official_in_torch(inputs)
    compiled = jax_side(jax_functions(flags)[name], inputs)

    def step():
        loss, gradients = compiled(inputs.hidden[0], inputs.kernels[0], inputs)
        return jax.block_until_ready((loss, *gradients))

    return step


def jax_functions(flags: argparse.Namespace) -> dict[str, Callable]:
    def fused_in_chunks(*arguments):
        return fused(*arguments, chunk=flags.chunk)

    return {"fused": fused_in_chunks, "dense": dense, "textbook": textbook}


def resident(field: str) -> float:
    """`VmRSS`, or its peak `VmHWM`, in bytes; 0 where the kernel does not say."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(field)), 0.0)


def peak_memory(flags: argparse.Namespace, vocab: int, name: str) -> float:
    """Resident bytes that one run of a side needs, in this process, which is new and has run nothing."""
    step = make_side(flags, draw_inputs(flags.targets, flags.width, vocab), name)
    RESET.write_text("5")  # the peak starts again from what is resident now
    before, results = resident("VmRSS"), step()
    del results
    return resident("VmHWM") - before


def peaks(flags: argparse.Namespace, vocab: int) -> dict[str, float]:
    """Name -> peak memory, where the kernel tells it."""
    if not RESET.exists():
        return {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(peak_memory, (flags, vocab, name)) for name in names_of_sides(flags)}


def run_side(step: Callable) -> Round:
    """One run, timed until its results are there."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss, dhidden, dkernel = step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    norms = (float(np.linalg.norm(np.asarray(g))) for g in (dhidden, dkernel))
    return Round(wall, cpu, (float(loss), *norms))


def race(sides: dict[str, Callable], rounds: int) -> dict[str, list[Round]]:
    """Every side in turn, in alternating order; the first round warms up and is dropped."""
    measured = {name: [] for name in sides}
    for done in range(rounds + 1):
        for name in list(sides) if done % 2 else list(sides)[::-1]:
            measured[name].append(run_side(sides[name]))
        check({name: runs[-1] for name, runs in measured.items()})
        print(f"  round {done} of {rounds}{' (dropped)' if not done else ''}", file=sys.stderr, flush=True)
    return {name: runs[1:] for name, runs in measured.items()}


def check(latest: dict[str, Round]) -> None:
    """The precondition: all sides computed the same."""
    tolerances = (LOSS_TOLERANCE, NORM_TOLERANCE, NORM_TOLERANCE)
    for name, one in latest.items():
        expected = latest["fused"].numbers
        if any(abs(x / y - 1) > t for x, y, t in zip(one.numbers, expected, tolerances, strict=True)):
            raise SystemExit(f"the sides disagree, so no figure is printed: fused {expected}, {name} {one.numbers}")


def planned(flags: argparse.Namespace, vocab: int) -> dict[str, tuple[float, float]]:
    """Name -> bytes of temporaries and of results that the compiler plans at `--plan-targets`."""
    inputs, found = abstract_inputs(flags.plan_targets, flags.width, vocab), {}
    for name, function in jax_functions(flags).items():
        memory = jax_side(function, inputs).memory_analysis()
        found[name] = memory.temp_size_in_bytes, memory.output_size_in_bytes
    return found


def spread(values) -> str:
    """Min - median - max."""
    return f"{np.min(values):.2f} - **{np.median(values):.2f}** - {np.max(values):.2f}"


def report(vocab: int, rounds: dict[str, list[Round]], plan: dict[str, tuple[float, float]], peak: dict) -> None:
    """Prints the rows of the table for one vocabulary."""
    for name, runs in rounds.items():
        ratios = [
            spread([getattr(r, clock) / getattr(ours, clock) for r, ours in zip(runs, rounds["fused"], strict=True)])
            for clock in ("wall", "cpu")
        ]
        cells = [vocab, name, f"{np.median([r.wall for r in runs]):.2f}", *(ratios if name != "fused" else "11")]
        cells.append(f"{peak[name] / 1e6:.0f} MB" if name in peak else "-")
        if name in plan:
            ours, theirs = plan["fused"], plan[name]
            cells += [f"{theirs[0] / 1e6:.0f} MB", f"{ours[0] / theirs[0]:.1%}", f"{sum(theirs) / sum(ours):.1f}"]
        else:
            cells += "---"
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128000, 151936])
    parser.add_argument("--targets", type=int, default=1024, help="targets of the timed runs")
    parser.add_argument("--plan-targets", type=int, default=8192, help="targets for which memory is planned")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    print(f"{versions()}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {vars(flags)}", flush=True)
    print(
        "| V | side | s | wall time / fused | CPU time / fused | peak memory | temporaries planned "
        "| fused's share of them | with results, / fused |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for vocab in flags.vocab:
        plan, peak = planned(flags, vocab), peaks(flags, vocab)
        inputs = draw_inputs(flags.targets, flags.width, vocab)
        sides = {name: make_side(flags, inputs, name) for name in names_of_sides(flags)}
        report(vocab, race(sides, flags.rounds), plan, peak)


if __name__ == "__main__":
    main()
