"""Measures what docs/exact.md says, draws its pictures and writes its tables: `python docs/make_exact.py`.

What is measured is in exact_methods.py beside it; here it is told.
"""

import functools
import io
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from exact_methods import (
    ADAM,
    BETA,
    BETA0,
    DESCENT,
    STEPS,
    Method,
    Run,
    World,
    contrastive,
    fastest,
    gap,
    ipo_limit,
    make_world,
    methods,
    nearest_tau,
    now,
    on_pairs,
    theorem1,
    with_soft_values,
)
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from palign import losses
from palign.eval.optima import (
    bradley_terry_preference,
    compare_pairs,
    divergence,
    kl_regularised_optimum,
    regularised_value,
)
from palign.report.svg import INK, MUTED, SERIES, STYLE

HERE = pathlib.Path(__file__).parent
PAGE, IMAGES = HERE / "exact.md", HERE / "images"
PIXELS_PER_INCH = 120
WIDTH = 8.0  # inches
DASHED = (2, 4)  # distilled curves that lie on the one before
PAPER = {"figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 10}

MANY, LENGTHS = 64, (2, 3, 4, 6)  # prompts and longest responses where nothing is trained
RATIOS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.125)  # beta / beta0


def main() -> None:
    """Draws all pictures and writes the tables into the page."""
    IMAGES.mkdir(exist_ok=True)
    with jax.enable_x64(True), matplotlib.rc_context(STYLE | PAPER):
        world = make_world()
        named = methods(world)
        runs = {name: fastest(world, method, DESCENT, optax.sgd) for name, method in named.items()}
        settled = {name: method._replace(limit=runs[name].limit) for name, method in named.items()}
        adam = {name: fastest(world, method, ADAM, optax.adam) for name, method in settled.items()}
        write_table("methods", methods_table(world, named, runs, adam))
        write_table("gap", gap_table())
        write_table("certain", certain_table(world))
        save(steps_figure(runs), "steps")
        save(gap_figure(), "gap")
        save(certain_figure(world, {name: runs[name].size for name in ("dpo", "ipo_sum")}), "certain")


# ---- the tables ----


def methods_table(
    world: World, named: dict[str, Method], runs: dict[str, Run], adam: dict[str, Run]
) -> list[list[str]]:
    """One row for each method."""
    start = regularised_value(world.ref, world.ref, world.rewards, beta=BETA).mean()
    best = kl_regularised_optimum(world.ref, world.rewards, beta=BETA).value.mean()
    rows = [["method", "KL of its limit to `pi*`", "gain in J", "steps, gradient descent", "steps, Adam"]]
    for name, run in runs.items():
        gained = regularised_value(run.limit, world.ref, world.rewards, beta=BETA).mean() - start
        cells = [f"{steps_cell(r)} ({r.size:g})" for r in (run, adam[name])]
        rows.append(
            [
                label(name) + named[name].setting,
                nats(gap(world, run.limit)),
                f"{100 * gained / (best - start):.1f}%",
                *cells,
            ]
        )
    return rows


def gap_table() -> list[list[str]]:
    """What composing the teacher state by state costs, by beta / beta0 and length."""
    rows = [["`beta / beta0`", *(f"KL, {n} tokens" for n in LENGTHS), "reward lost", "KL, contrastive", "reward lost"]]
    return rows + [gap_row({length: make_world(length, MANY) for length in LENGTHS}, ratio) for ratio in RATIOS]


def gap_row(worlds: dict[int, World], ratio: float) -> list[str]:
    """One row: Theorem 1's teacher at every length and its reward at the longest, then the contrastive one there."""
    cells = [nats(teacher_gap(world, theorem1, ratio)) for world in worlds.values()]
    longest = worlds[max(worlds)]
    cells.append(f"{reward_lost(longest, theorem1, ratio):.2f}")
    if ratio < 1:
        cells += [nats(teacher_gap(longest, contrastive, ratio)), f"{reward_lost(longest, contrastive, ratio):.2f}"]
    return [f"{ratio:g}", *cells, *[""] * (len(LENGTHS) + 3 - len(cells))]


def teacher_gap(world: World, teacher: Callable, ratio: float) -> float:
    """KL of a teacher, composed state by state, to the optimum for whole responses, mean over prompts."""
    return float(composed(world, ratio, teacher=teacher)[0])


def reward_lost(world: World, teacher: Callable, ratio: float) -> float:
    """Mean reward of the optimum less that of the composed teacher."""
    return round(float(composed(world, ratio, teacher=teacher)[1]), 9) + 0.0  # rounding has no sign


@functools.partial(jax.jit, static_argnames="teacher")
def composed(world: World, ratio: float, *, teacher: Callable) -> tuple[jax.Array, jax.Array]:
    """What `teacher_gap` and `reward_lost` return."""
    best = kl_regularised_optimum(world.ref, world.rewards, beta=ratio * BETA0).logps
    made = now(world, teacher(world, ratio * BETA0))
    return divergence(made, best).mean(), (world.rewards * (jnp.exp(best) - jnp.exp(made))).sum(-1).mean()


def certain_table(world: World) -> list[list[str]]:
    """How far the population optima of DPO and IPO go as preferences become certain."""
    rows = [["factor on the rewards", "the better of a pair wins", "KL to the reference, `dpo`", "`ipo_sum`"]]
    tau = nearest_tau(world)
    for factor in (0.5, 1.0, 4.0, 16.0, 64.0):
        moved = map(nats, optima_moved(world, factor, tau))
        rows.append([f"{factor:g}", f"{100 * certainty(world, factor):.1f}%", *moved])
    return rows


def certainty(world: World, factor: float) -> float:
    """How often the better response of a pair is preferred."""
    law = compare_pairs(bradley_terry_preference(factor * world.rewards), world.ref)
    better = jnp.diff(-world.rewards[:, law.responses], axis=-1)[..., 0] > 0
    return float((law.probability * better).sum(-1).mean())


def optima_moved(world: World, factor: float, tau: float) -> tuple[float, float]:
    """KL of DPO's and of IPO's population optimum from the reference, nats."""
    scaled = world._replace(rewards=factor * world.rewards)
    first = divergence(kl_regularised_optimum(world.ref, scaled.rewards, beta=BETA).logps, world.ref).mean()
    return float(first), float(divergence(ipo_limit(scaled, tau), world.ref).mean())


def steps_cell(run: Run) -> str:
    """Steps to the limit."""
    return f"more than {STEPS}" if run.steps is None else str(run.steps)


def label(name: str) -> str:
    """A loss's name as code; words as they are."""
    return name if " " in name else f"`{name}`"


def nats(value: float) -> str:
    """Three digits, and 0 for what is rounding."""
    return "0" if abs(value) < 1e-12 else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.0e}"


def write_table(name: str, rows: list[list[str]]) -> None:
    """Prints a table and puts it in its place on the page."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    table = "\n".join([head, "|" + "---|" * len(rows[0]), *body])
    print(f"{name}\n{table}\n")
    opening, closing = f"<!-- {name}: written by make_exact.py -->\n", "\n<!-- end -->"
    page = PAGE.read_text(encoding="utf-8")
    found = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", flags=re.S)
    if len(found.findall(page)) != 1:
        raise ValueError(f"{PAGE.name}: expected one table between {opening!r} and {closing!r}")
    PAGE.write_text(found.sub(lambda _: opening + table + closing, page), encoding="utf-8")


# ---- the pictures ----


def steps_figure(runs: dict[str, Run]) -> Figure:
    """KL to pi* against gradient steps: losses of preferences on the left, distillation on the right."""
    figure, (left, right) = panels(1, 2, 3.7, sharey=True)
    distilled = [name for name in runs if "align" in name or "soft" in name]
    for axes, names in ((left, [n for n in runs if n not in distilled]), (right, distilled)):
        for i, (name, colour) in enumerate(zip(names, SERIES, strict=False)):
            dashes = (0, (3, 2)) if i in DASHED and axes is right else "-"
            axes.plot(np.arange(1, STEPS + 1), runs[name].to_best, color=colour, label=name, linestyle=dashes)
        axes.set(xlim=(1, STEPS), xlabel="steps of gradient descent")
        log_axis(axes, "x", (1, 10, 100, 1000))
        log_axis(axes, "y", (1, 1e-2, 1e-4, 1e-6, 1e-8))
        axes.set_ylim(1e-9, 3)
        axes.legend(fontsize=8.5, loc="lower left", handlelength=1.8)
    left.set(ylabel="KL(policy, pi*), nats", title="from preferences")
    right.set_title("from DPO models")
    return figure


def gap_figure() -> Figure:
    """What composing the teacher state by state costs."""
    figure, (left, right) = panels(1, 2, 3.3)
    ratios = np.geomspace(0.1, 2, 40).tolist()
    for length, colour in zip(LENGTHS, SERIES, strict=False):
        world = make_world(length, MANY)
        left.plot(ratios, [teacher_gap(world, theorem1, r) for r in ratios], color=colour, label=f"{length} tokens")
    log_axis(left, "y", (1, 0.1, 0.01, 0.001))
    left.set(ylim=(3e-4, 12), ylabel="KL(theorem 1's teacher, pi*), nats")
    left.legend(fontsize=8.5, loc="lower left", title="longest response", title_fontsize=8.5)
    beyond = [r for r in ratios if r < 1]
    right.plot(ratios, [reward_lost(world, theorem1, r) for r in ratios], color=SERIES[0], label="theorem 1")
    right.plot(beyond, [reward_lost(world, contrastive, r) for r in beyond], color=SERIES[1], label="contrastive")
    corrected = [reward_lost(world, with_soft_values, r) for r in ratios]
    right.plot(ratios, corrected, color=SERIES[2], label="theorem 1 + soft values")
    right.set(ylabel=f"mean reward lost, {length} tokens")
    right.legend(fontsize=8.5, loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=1)
    for axes in (left, right):
        axes.axvline(1, color=MUTED, linewidth=0.8, zorder=1)
        log_axis(axes, "x", (0.1, 0.2, 0.5, 1, 2))
        axes.set(xlabel="beta / beta0", xlim=(0.1, 2))
    return figure


def certain_figure(world: World, sizes: dict[str, float]) -> Figure:
    """DPO and IPO as preferences become certain: their optima, and training where they are certain."""
    figure, (left, right) = panels(1, 2, 3.3, sharey=True)
    factors, steps, tau = np.geomspace(0.1, 100, 61), 10_000, nearest_tau(world)
    moved = np.asarray([optima_moved(world, float(factor), tau) for factor in factors])
    certain = compare_pairs((jnp.sign(world.rewards[:, :, None] - world.rewards[:, None]) + 1) / 2, world.ref)
    for i, (name, loss, beta) in enumerate((("dpo", losses.dpo, BETA), ("ipo_sum", losses.ipo, tau))):
        left.plot(factors, moved[:, i], color=SERIES[i], label=name)
        path = trained(world, on_pairs(world, loss, certain, beta), sizes[name], steps)
        right.plot(np.arange(1, steps + 1), path, color=SERIES[i], label=name)
    collapse = -float(jnp.take_along_axis(world.ref, world.rewards.argmax(-1, keepdims=True), axis=-1).mean())
    for axes in (left, right):
        axes.axhline(collapse, color=MUTED, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        axes.set_ylim(0, 1.12 * collapse)
    left.text(0.11, 1.01 * collapse, "all mass on the best response", color=INK, fontsize=8.5, va="bottom")
    log_axis(left, "x", (0.1, 1, 10, 100))
    log_axis(right, "x", (1, 10, 100, 1000, 10_000))
    left.set(
        xlabel="factor on the rewards", ylabel="KL to the reference, nats", title="population optimum", xlim=(0.1, 100)
    )
    right.set(xlabel="steps of gradient descent", title="training on certain preferences", xlim=(1, steps))
    left.legend(fontsize=8.5, loc="center left")
    return figure


def log_axis(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axes.set(**{f"{which}scale": "log"})
    axis.set_ticks(ticks, [f"{tick:g}" if tick >= 1e-3 else f"{tick:.0e}".replace("e-0", "e-") for tick in ticks])
    axis.set_minor_locator(NullLocator())


def trained(world: World, objective: Callable, size: float, steps: int) -> np.ndarray:
    """KL to the reference after each step of gradient descent."""
    gradient = jax.grad(objective)

    def step(logits, _):
        logits = logits - size * gradient(logits)
        return logits, divergence(now(world, logits), world.ref).mean()

    return np.asarray(jax.jit(lambda z: jax.lax.scan(step, z, None, length=steps)[1])(world.ref_logits))


def panels(rows: int, columns: int, height: float, **shared: bool) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a grid of panels; a single row is flat."""
    figure = Figure(figsize=(WIDTH, height), dpi=PIXELS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **shared)


def save(figure: Figure, name: str, colours: int = 96) -> None:
    """Writes a picture with a small palette, which makes it small; the same bytes in every run."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    image = Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    path = IMAGES / f"exact_{name}.png"
    image.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
