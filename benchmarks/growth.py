"""How the cost of a step grows with each size, and what the head keeps in memory, drawn on logarithmic scales.

    python -m benchmarks.growth

The DPO step with AdamW and a cached reference, on one row of equal trees, each prompt once. Points of all sweeps take
turns in one process on a pinned core, in alternating order; CPU seconds, the first round dropped. The exponent of a
sweep is the slope of a line through the logarithms, fitted in every round; beside it stands that of the floating-point
operations that `palign.plan.cost` counts for the same points, which is what the design makes of that size. A cost that
has a constant part (the prompt under more responses, say) grows with an exponent below 1, in both.

The head's memory is read from compiled programs, of which nothing is run: its value and both gradients.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator

from benchmarks import driver, single
from benchmarks.contestants import equal_trees
from palign.config.schema import DataConfig, ObjectiveConfig, RunConfig
from palign.heads.target_values import target_logps
from palign.plan.cost import work_of
from palign.plan.step import abstract_step
from palign.report.svg import INK, MUTED, STYLE, colours, inline_svg, new_figure
from palign.types import Batch, Unembedding

CHUNK = 256  # targets of a trip of the head
MEBI = 2**20


class Sweep(NamedTuple):
    """One size that grows while the others stay.

    Attributes:
        size: a flag of `equal_trees`.
        label: of the axis.
        values: smallest first.
        fixed: other flags.
        expected: what the design says about the exponent.
    """

    size: str
    label: str
    values: tuple[int, ...]
    fixed: Mapping[str, Any]
    expected: str


SWEEPS = {
    "prompt": Sweep(
        "prompt",
        "tokens of the prompt",
        (256, 512, 1024, 2048, 4096),
        {},
        "1 for the layers' products, towards 2 for long prompts: each token attends to all before it",
    ),
    "response": Sweep(
        "response",
        "tokens of a response",
        (64, 128, 256, 512, 1024),
        {"prompt": 64},
        "1 for the layers and the head, towards 2 for long responses: attention again",
    ),
    "responses": Sweep(
        "responses",
        "responses of a prompt",
        (2, 4, 8, 16, 32),
        {"prompt": 64, "method": "lipo_lambda"},
        "1, and below it while the prompt, which is computed once, weighs: no response attends to another",
    ),
    "vocabulary": Sweep(
        "vocabulary",
        "vocabulary",
        (8192, 16384, 32768, 65536, 131072),
        {"prompt": 64, "response": 128},
        "1 for head and optimizer, over the constant cost of the layers",
    ),
    "row": Sweep(
        "trees",
        "trees in the row, 256 tokens each",
        (2, 4, 8, 16, 32),
        {"prompt": 128},
        "1: no tree attends to another, however long the row",
    ),
    "width": Sweep(
        "width",
        "width of the model",
        (64, 128, 256, 512, 1024),
        {"trees": 2, "prompt": 128},
        "2 for weights and products with them, 1 for attention and head, which weigh while models are small",
    ),
}


def main() -> None:
    flags = driver.parse(__doc__, rounds=3)
    cores, before = driver.choose_cores(flags.cores), os.getloadavg()
    os.sched_setaffinity(0, cores)  # before jax starts its threads
    measured = {name: measure(sweep, flags) for name, sweep in sweeps(flags).items()}
    memory = measure_head(flags)
    flags.out.mkdir(parents=True, exist_ok=True)
    for name, svg in draw(measured, memory).items():
        (flags.out / f"growth_{name}.svg").write_text(svg + "\n")
    single.write("growth", flags, cores, before, tables(measured, memory), sweeps=measured, head=memory)


def sweeps(flags: argparse.Namespace) -> dict[str, Sweep]:
    """All of them; two small points each where figures mean nothing."""
    if not flags.tiny:
        return SWEEPS
    small = {"width": 32, "layers": 1, "prompt": 64}
    return {
        name: sweep._replace(values=sweep.values[:2], fixed={**small, **sweep.fixed}) for name, sweep in SWEEPS.items()
    }


def measure(sweep: Sweep, flags: argparse.Namespace) -> dict[str, Any]:
    """A sweep's seconds, operations and exponents."""
    points = [point(sweep, value, flags.seed) for value in sweep.values]
    steps = [equal_trees.make_step(each)[0] for each in points]
    seconds: list[list[float]] = []
    for i in range(flags.rounds + 1):
        order = list(enumerate(steps))
        taken = {k: time_step(step, i) for k, step in (order if i % 2 else order[::-1])}
        seconds.append([taken[k] for k in range(len(steps))])
        print(f"{sweep.label}: round {i} of {flags.rounds}{'' if i else ' (dropped)'}", file=sys.stderr, flush=True)
    seconds = seconds[1:]  # the first compiles
    counted = [count_flops(each) for each in points]
    exponents = sorted(fit_exponent(sweep.values, each) for each in seconds)
    return {
        "label": sweep.label,
        "values": list(sweep.values),
        "fixed": dict(sweep.fixed),
        "seconds": seconds,
        "flops": counted,
        "exponent": {"min": exponents[0], "median": statistics.median(exponents), "max": exponents[-1]},
        "flops_exponent": fit_exponent(sweep.values, counted),
        "expected": sweep.expected,
    }


def point(sweep: Sweep, value: int, seed: int) -> argparse.Namespace:
    """The flags of one point of a sweep."""
    chosen = {"response": 64, "seed": seed} | dict(sweep.fixed) | {sweep.size: value}
    return equal_trees.parse([f"--{name}={chosen[name]}" for name in chosen])


def time_step(step: Any, index: int) -> float:
    """CPU seconds of one step."""
    start = time.process_time()
    step(index)
    return time.process_time() - start


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of the line through (log size, log cost) by least squares: p where cost = c * size ** p."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def count_flops(flags: argparse.Namespace) -> float:
    """Floating-point operations of a point's step as it is run."""
    batch = equal_trees.pack(flags, equal_trees.draw_trees(flags, 0))
    config = RunConfig(
        model=equal_trees.model_of(flags),
        objective=ObjectiveConfig(loss_type=(flags.method,), reference="cached"),
        reference_from="elsewhere",
        data=DataConfig(row_length=batch.token.shape[1], rows_per_step=1),
    )
    step = abstract_step(config, jax.devices()[:1])
    return work_of(step._replace(row=jax.tree.map(lambda x: x[0], batch))).flops


def measure_head(flags: argparse.Namespace) -> list[dict[str, float]]:
    """Temporary bytes that the compiler plans for the head and for full logits, by vocabulary."""
    targets, sizes, width = (1024, 8192), (8192, 16384, 32768, 65536, 131072), 256
    if flags.tiny:
        targets, sizes, width = (64, 512), (256, 512), 16
    found = []
    for vocabulary in sizes:
        kernel = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
        few, many = (plan(in_chunks, kernel, number) for number in targets)
        full = plan(full_logits, kernel, targets[1])
        tile = 4 * min(CHUNK, targets[0]) * vocabulary
        found.append({"vocabulary": vocabulary, "tile": tile, "few": few, "many": many, "full": full})
    return found


def plan(logps: Callable[..., jax.Array], kernel: jax.ShapeDtypeStruct, targets: int) -> int:
    """Temporary bytes of the sum of log-probabilities and its gradients with respect to hidden states and kernel."""
    hidden = jax.ShapeDtypeStruct((targets, kernel.shape[0]), jnp.float32)
    token = jax.ShapeDtypeStruct((targets,), jnp.int32)
    both = jax.value_and_grad(lambda *arrays: jnp.sum(logps(*arrays)), argnums=(0, 1))
    return jax.jit(both).lower(hidden, kernel, token).compile().memory_analysis().temp_size_in_bytes


def in_chunks(hidden: jax.Array, kernel: jax.Array, token: jax.Array) -> jax.Array:
    """The head of palign; every position of one row predicts a token of one response."""
    unused, place = jnp.zeros((1, 1), jnp.int32), jnp.arange(token.size)[None]
    batch = Batch(*(unused,) * 4, place, token[None], jnp.ones_like(place), *(unused,) * 6)
    return target_logps(hidden[None], Unembedding(kernel, None, kernel.shape[1]), batch, chunk=CHUNK)


def full_logits(hidden: jax.Array, kernel: jax.Array, token: jax.Array) -> jax.Array:
    """The same as one writes it down."""
    return jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel), token[:, None], axis=-1)


def tables(measured: Mapping[str, Any], memory: Sequence[Mapping[str, float]]) -> str:
    """The figures as Markdown."""
    lines = ["| size | from, to | seconds of CPU | exponent: min - median - max | of counted operations | design |"]
    lines += ["|---|---|---|---|---|---|"]
    for sweep in measured.values():
        values, p = sweep["values"], sweep["exponent"]
        ends = " ... ".join(f"{median_of(sweep)[i]:.3f}" for i in (0, -1))
        spread = f"{p['min']:.2f} - **{p['median']:.2f}** - {p['max']:.2f}"
        cells = (sweep["label"], f"{values[0]}, {values[-1]}", ends, spread, f"{sweep['flops_exponent']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {sweep['expected']} |")
    lines += ["", "| V | a tile | head, 1024 targets | head, 8192 targets | in tiles | full logits, 8192 targets |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in memory:
        sizes = (f"{row[name] / MEBI:,.1f} MiB" for name in ("tile", "few", "many"))
        in_tiles = f"{row['few'] / row['tile']:.2f}, {row['many'] / row['tile']:.2f}"
        lines.append(f"| {row['vocabulary']:,} | {' | '.join(sizes)} | {in_tiles} | {row['full'] / MEBI:,.1f} MiB |")
    return "\n".join(lines)


def median_of(sweep: Mapping[str, Any]) -> list[float]:
    """Seconds of each point."""
    return [statistics.median(column) for column in zip(*sweep["seconds"], strict=True)]


def draw(measured: Mapping[str, Any], memory: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """A picture for each sweep, and one of the head."""
    drawn = {}
    for name, sweep in measured.items():
        values, seconds = sweep["values"], median_of(sweep)
        counted = np.array(sweep["flops"]) * seconds[-1] / sweep["flops"][-1]
        series = {
            f"measured, exponent {sweep['exponent']['median']:.2f}": seconds,
            f"counted operations, {sweep['flops_exponent']:.2f}": counted,
        }
        drawn[name] = picture(name, values, series, sweep["label"], "CPU seconds of a step")
    sizes = [row["vocabulary"] for row in memory]
    names = {"full": "full logits, 8192 targets", "many": "head, 8192 targets", "few": "head, 1024 targets"}
    series = {label: [row[key] / MEBI for row in memory] for key, label in names.items()}
    tile = {"a tile of logits": [row["tile"] / MEBI for row in memory]}
    drawn["head"] = picture("head", sizes, series | tile, "vocabulary", "MiB of temporaries")
    return drawn


def picture(name: str, x: Sequence[float], series: Mapping[str, Any], x_label: str, y_label: str) -> str:
    """Lines with dots on logarithmic scales, as SVG; all but the first are dashed."""
    palette = colours(list(series))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.2, 2.9 + 0.22 * len(series))
        axes = figure.add_axes((0.2, 0.5 / figure.get_figheight(), 0.73, 2.3 / figure.get_figheight()))
        for i, (label, y) in enumerate(series.items()):
            axes.plot(x, y, color=palette[label], marker="o", markersize=4, linestyle="--" if i else "-", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(x), [f"{value:,}" for value in x])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label, color=MUTED)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, fontsize=10, labelcolor=INK)
        return inline_svg(figure, f"growth-{name}", f"{y_label} against {x_label}: {', '.join(series)}")


if __name__ == "__main__":
    main()
