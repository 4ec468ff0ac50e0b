"""Draws the pictures of docs/gallery.md, from the losses themselves: `python docs/make_gallery.py`.

Every curve is a loss of `palign.losses` or its derivative by `jax.grad`; no formula is written down a second time.
"""

import io
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from palign import losses
from palign.report.svg import GRID, INK, MUTED, SERIES, STYLE

IMAGES = pathlib.Path(__file__).parent / "images"
PIXELS_PER_INCH = 120
WIDTH = 8.0  # inches
PAPER = {"figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 10}
BETA = 0.1


def main() -> None:
    """Draws all pictures."""
    IMAGES.mkdir(exist_ok=True)
    drawings = (logistic, targets, bounded, divergences, anchors, reference_free, unpaired, lambda_weights, lists)
    with matplotlib.rc_context(STYLE | PAPER):
        for draw in (*drawings, distillation, aligndistil, rewards, supervised):
            save(draw(), draw.__name__)


def logistic() -> Figure:
    """DPO and what is done to its label, its target or its gradient."""
    scores = jnp.array([[2.0, 0.0]])
    return loss_and_slope(
        {
            "dpo": split(losses.dpo),
            "cdpo": split(losses.cdpo),
            "robust_dpo": split(losses.robust_dpo),
            "margin_dpo": split(lambda policy, ref, beta: losses.margin_dpo(policy, ref, scores + 0 * ref, beta=beta)),
            "discopop": split(losses.discopop),
            "hinge": split(losses.hinge),
        },
        np.linspace(-40, 60, 401),
        loss_limits=(-0.5, 5.2),
    )


def targets() -> Figure:
    """Losses that regress the margin on a number."""
    scores = jnp.array([[2.0, 0.0]])
    return loss_and_slope(
        {
            "ipo_sum": split(losses.ipo),
            "sppo_hard": split(losses.sppo_hard),
            "cal_dpo": split(losses.cal_dpo),
            "margin_mse": against(lambda policy: losses.margin_mse(policy, scores + 0 * policy)),
        },
        np.linspace(-10, 25, 281),
        loss_limits=(-8, 220),
    )


def bounded() -> Figure:
    """Losses that give up pairs which are far out."""
    return loss_and_slope(
        {
            "dpo": split(losses.dpo),
            "exo_pair": split(losses.exo_pair),
            "apo_zero": split(losses.apo_zero),
            "apo_down": split(losses.apo_down),
        },
        np.linspace(-120, 120, 401),
        loss_limits=(-0.3, 8),
    )


def divergences() -> Figure:
    """DPO under other divergences."""
    return loss_and_slope(
        {
            "dpo": split(losses.dpo),
            "f_dpo_js": split(losses.f_dpo_js),
            "f_dpo_alpha": split(losses.f_dpo_alpha),
            "f_dpo_forward_kl": split(losses.f_dpo_forward_kl),
        },
        np.linspace(-8, 8, 321),
        loss_limits=(-0.1, 4),
        slope_limits=(-0.75, 0.03),
    )


def anchors() -> Figure:
    """Losses by both log-ratios, with the way that gradient descent takes."""
    shown = {
        "dpo": (losses.dpo, {}),
        "nca_pair": (losses.nca_pair, {}),
        "apo_zero": (losses.apo_zero, {}),
        "apo_down": (losses.apo_down, {}),
        "dpop": (losses.dpop, {"penalty": 2.0}),
        "sppo_hard": (losses.sppo_hard, {}),
    }
    figure, grid = panels(2, 3, 5.5, sharex=True, sharey=True)
    ticks = jnp.linspace(-20.0, 20.0, 41)
    chosen, rejected = jnp.meshgrid(ticks, ticks)
    policy = jnp.stack([chosen, rejected], axis=-1).reshape(-1, 2)
    for axes, (name, (loss, settings)) in zip(grid.flat, shown.items(), strict=True):
        values, slopes = value_and_slope(lambda p, f=loss, s=settings: f(p, 0 * p, beta=BETA, **s), policy)
        axes.contourf(ticks, ticks, values.reshape(41, 41), levels=8, cmap="Blues", alpha=0.75)
        down = -slopes.reshape(41, 41, 2)
        axes.streamplot(
            np.asarray(ticks), np.asarray(ticks), down[..., 0], down[..., 1],
            color=INK, density=0.4, linewidth=0.8, arrowsize=0.8,
        )  # fmt: skip
        axes.plot(0, 0, "o", color="white", markeredgecolor=INK, markersize=7, zorder=5)
        axes.set(title=name, xlim=(-20, 20), ylim=(-20, 20), xticks=(-20, 0, 20), yticks=(-20, 0, 20))
    figure.supxlabel("log-ratio of the chosen response, nats", color=MUTED, fontsize=10)
    figure.supylabel("log-ratio of the rejected one, nats", color=MUTED, fontsize=10)
    return figure


def reference_free() -> Figure:
    """Losses without reference: per token above, per response below."""
    length, mean = 20, -1.5
    per_token = {
        "simpo": against(losses.simpo, mean),
        "alphapo": against(losses.alphapo, mean),
        "orpo": against(losses.orpo, mean),
    }
    per_response = {
        "cpo": against(lambda policy: losses.cpo(policy, policy[:, 0] / length), mean * length),
        "slic_hf": against(lambda policy: losses.slic_hf(policy, policy[:, 0]), mean * length),
    }
    figure, grid = panels(2, 2, 5.6)
    fill(grid[0], per_token, np.linspace(-2, 2, 201), loss_limits=(0, 6.2), unit="nats a token")
    fill(grid[1], per_response, np.linspace(-15, 15, 301), loss_limits=(0, 20), first_colour=3)
    return figure


def unpaired() -> Figure:
    """Losses of single responses, above for a thumbs-up and below for a thumbs-down."""
    figure, grid = panels(2, 2, 5.6)
    for row, thumb in zip(grid, (True, False), strict=True):
        judged = {
            "kto, KL 10": lambda p, t=thumb: losses.kto(p, 0 * p, jnp.full(p.shape, t), jnp.array(10.0), beta=BETA),
            "bco, shift 1": lambda p, t=thumb: losses.bco(
                p, 0 * p, jnp.full(p.shape, t), jnp.ones_like(p), jnp.array(1.0), beta=BETA
            ),
            "apo_zero": lambda p, t=thumb: losses.apo_zero_unpaired(p, 0 * p, jnp.full(p.shape, t), beta=BETA),
        }
        fill(row, judged, np.linspace(-60, 60, 301), loss_limits=(-0.2, 5.2), across="log-ratio", slope_limits=None)
        row[0].set_title("thumbs-up" if thumb else "thumbs-down")
        row[1].set_ylim(*((-0.105, 0.005) if thumb else (-0.005, 0.105)))
    return figure


def lambda_weights() -> Figure:
    """LiPO-lambda's weight of each pair, once for a list in the right order and once upside down."""
    labels = jnp.linspace(1.0, 0.0, 6)
    figure = new_figure(3.7)
    first, second, bars = figure.subplots(1, 3, width_ratios=(3.6, 3.6, 2.2))
    for axes, order, title in ((first, 1.0, "right order"), (second, -1.0, "upside down")):
        weights = pair_weights(order * labels, labels)
        axes.imshow(np.where(weights > 0, weights, np.nan), cmap="Blues", vmin=0, vmax=1)
        for i, j in zip(*np.nonzero(weights), strict=True):
            axes.text(j, i, f"{weights[i, j]:.2f}", ha="center", va="center", fontsize=7.5,
                      color="white" if weights[i, j] > 0.6 else INK)  # fmt: skip
        axes.set(title=title, xlabel="worse response, label", xticks=range(6), yticks=range(6))
        axes.set_xticklabels([f"{v:.1f}" for v in labels])
        axes.set_yticklabels([f"{v:.1f}" for v in labels] if order > 0 else [])
        axes.grid(visible=False)
    first.set_ylabel("better response, label")
    bars.bar(range(2, 7), [ends_weight(k) for k in range(2, 7)], color=SERIES[0], width=0.6)
    bars.set(title="labels 1 and 0", xlabel="ranks 1 and k: k", ylabel="weight of the pair", xticks=range(2, 7))
    bars.grid(visible=False, axis="x")
    bars.set_box_aspect(1.5)
    return figure


def ends_weight(rank: int) -> float:
    """The weight of a pair of labels 1 and 0 on the first and the given rank; what is between has label 1/2."""
    labels = jnp.full(rank, 0.5).at[0].set(1.0).at[-1].set(0.0)
    return float(pair_weights(-jnp.arange(float(rank)), labels)[0, -1])


def pair_weights(order: jax.Array, labels: jax.Array) -> np.ndarray:
    """Reads the weights off the loss: each pair's term is the only one with its mixed second derivative."""

    def loss(logps):
        return losses.lipo_lambda(logps[None], jnp.zeros((1, labels.size)), labels[None], valid, beta=1.0)[0]

    logps, valid = 1e-3 * order, jnp.ones((1, labels.size), bool)
    gaps = logps[:, None] - logps
    weights = -jax.hessian(loss)(logps) / (jax.nn.sigmoid(gaps) * jax.nn.sigmoid(-gaps))
    return np.asarray(jnp.where(labels[:, None] > labels, weights, 0.0))


def lists() -> Figure:
    """What pushes each of four responses before any training."""
    zeros, labels, valid = jnp.zeros((1, 4)), jnp.array([[1.0, 0.8, 0.3, 0.0]]), jnp.ones((1, 4), bool)
    scored = {
        name: lambda p, name=name: getattr(losses, name)(p, zeros, labels, valid, beta=BETA)
        for name in (
            "plackett_luce", "lipo_lambda", "lipo_pair_logistic", "lipo_softmax", "listnet", "exo", "nca",
            "lipo_pointwise_mse", "lipo_pointwise_sigmoid", "sppo", "gpo",
        )
    }  # fmt: skip
    scored["pairwise_mse"] = lambda p: losses.pairwise_mse(p, labels, valid)
    figure, grid = panels(3, 4, 5.4, sharey=True)
    for axes, (name, loss) in zip(grid.flat, scored.items(), strict=True):
        push = -value_and_slope(loss, zeros)[1][0]
        push = push / np.abs(push).max()
        axes.bar(range(4), push, color=[SERIES[0] if x > 0 else SERIES[1] for x in push], width=0.65)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_title("listnet, info_nca" if name == "listnet" else name, fontsize=10)
        axes.set(xticks=range(4), xticklabels=[f"{x:g}" for x in labels[0].tolist()], ylim=(-1.12, 1.12))
        axes.grid(visible=False, axis="x")
    figure.supxlabel("label of the response", color=MUTED, fontsize=10)
    figure.supylabel("push on its log-probability (largest = 1)", color=MUTED, fontsize=10)
    return figure


def distillation() -> Figure:
    """Divergences as the teacher is sharpened or flattened, and what the two KLs make of a teacher with two modes."""
    logits = jnp.array([3.0, 2.0, 1.0, 0.0, -1.0, -3.0])
    temperatures = np.geomspace(0.2, 5, 161)
    teachers = logits / jnp.asarray(temperatures)[:, None]
    students = jnp.broadcast_to(logits, teachers.shape)
    divergences = (losses.forward_kl, losses.reverse_kl, losses.scaled_jsd, losses.generalised_jsd)
    figure, (left, right) = panels(1, 2, 3.3)
    curves = {f.__name__: np.asarray(f(students, teachers)) for f in divergences}
    curves["binary_kl_norm"] = np.asarray(losses.binary_kl_norm(students, teachers))
    for (name, values), colour in zip(curves.items(), SERIES, strict=False):
        left.plot(temperatures, values, color=colour, label=name)
    left.set(
        xscale="log", xlabel="temperature of the teacher; student: 1", ylabel="divergence, nats", ylim=(-0.05, 2.9)
    )
    left.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    left.minorticks_off()
    left.legend(fontsize=8.5, loc="upper right", handlelength=1.4)
    place = jnp.arange(40.0)
    teacher = jnp.logaddexp(-0.5 * ((place - 11) / 2.5) ** 2, jnp.log(0.55) - 0.5 * ((place - 28) / 2.5) ** 2)
    right.fill_between(place, jax.nn.softmax(teacher), color=GRID, label="teacher")
    for name, colour in (("forward_kl", SERIES[0]), ("reverse_kl", SERIES[1])):
        right.plot(place, jax.nn.softmax(best_bell(getattr(losses, name), teacher)), color=colour, label=name)
    right.set(xlabel="token", ylabel="probability", ylim=(0, 0.185))
    right.legend(fontsize=8.5)
    return figure


def best_bell(divergence: Callable, teacher: jax.Array) -> jax.Array:
    """The logits of the bell curve that is nearest to the teacher."""
    centres, widths = jnp.meshgrid(jnp.linspace(0.0, 39.0, 118), jnp.linspace(1.0, 16.0, 61))
    bells = -0.5 * ((jnp.arange(40.0) - centres.reshape(-1, 1)) / widths.reshape(-1, 1)) ** 2
    return bells[jnp.argmin(divergence(bells, jnp.broadcast_to(teacher, bells.shape)))]


def aligndistil() -> Figure:
    """The three weights of a token, and the teacher that lies beyond the DPO model."""
    figure, (left, right) = panels(1, 2, 3.2)
    alphas = np.linspace(0.01, 4, 300)
    weights = {
        "aligndistil": losses.adaptive_weight(jnp.asarray(alphas), beta=BETA),
        "aligndistil_capped": losses.capped_weight(jnp.asarray(alphas), beta=BETA, cap=1.0),
        "aligndistil_constant": losses.constant_weight(jnp.asarray(alphas), beta=BETA),
    }
    for (name, values), colour, dashes in zip(weights.items(), SERIES, ("-", (0, (4, 2)), "-"), strict=False):
        left.plot(alphas, values, color=colour, label=name, linestyle=dashes)
    left.set(yscale="log", xlabel="alpha, how far the teacher is extrapolated", ylabel="weight of the token's KL")
    left.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    left.minorticks_off()
    left.legend(fontsize=8.5)
    reverse, dpo = jnp.log(jnp.array([[0.3, 0.3, 0.25, 0.15], [0.4, 0.25, 0.25, 0.1]]))
    ratios = np.linspace(0.01, 8, 81)
    teachers = [losses.contrastive_teacher(dpo, reverse, ratio=r).logits for r in ratios.tolist()]
    probabilities = jax.nn.softmax(jnp.stack(teachers), axis=-1)
    for token, colour in enumerate(SERIES[:4]):
        label = f"{jnp.exp(reverse[token]):.2f} and {jnp.exp(dpo[token]):.2f}"
        right.plot(ratios, probabilities[:, token], color=colour, label=label)
    right.legend(fontsize=8.5, title="reverse DPO and DPO model", title_fontsize=8.5, loc=(0.42, 0.33))
    right.set(
        xlabel="alpha; at 0 the DPO model", ylabel="teacher's probability of a token", xlim=(0, 8), ylim=(-0.02, 1)
    )
    return figure


def rewards() -> Figure:
    """Losses of reward models."""
    by_lead = {
        "bradley_terry": against(losses.bradley_terry),
        "margin, m = 2": against(lambda r: losses.bradley_terry_margin(r, jnp.full(len(r), 2.0))),
        "scaled, m = 2": against(lambda r: losses.bradley_terry_scaled(r, jnp.full(len(r), 2.0))),
    }
    figure, grid = panels(1, 3, 3.1)
    fill(grid[:2], by_lead, np.linspace(-5, 7, 241), across="lead", unit="rewards", loss_limits=(-0.2, 8))
    means = jnp.linspace(-6, 6, 121)
    pairs = jnp.stack([means + 0.5, means - 0.5], axis=-1)
    grid[2].plot(means, losses.bradley_terry(pairs), color=SERIES[0])
    for coefficient, dashes in ((0.01, "-"), (0.05, (0, (4, 2)))):
        values = losses.bradley_terry_centred(pairs, coefficient=coefficient)
        grid[2].plot(means, values, color=SERIES[3], linestyle=dashes, label=f"centred, {coefficient}")
    grid[2].set(xlabel="mean of both rewards; lead 1", ylabel="loss, nats", ylim=(0, 8))
    grid[2].legend(fontsize=8.5, loc="upper center")
    return figure


def supervised() -> Figure:
    """What one token feels, by its probability."""
    probabilities = np.linspace(0.002, 0.998, 400)
    figure, grid = panels(1, 2, 3.1)
    logits = jnp.stack([jnp.log(probabilities), jnp.log1p(-probabilities)], axis=-1)
    for loss, colour in ((losses.nll, SERIES[0]), (losses.dft, SERIES[1])):
        values = loss(jnp.log(jnp.asarray(probabilities)))
        _, slopes = value_and_slope(lambda z, f=loss: f(jax.nn.log_softmax(z)[:, 0]), logits)
        grid[0].plot(probabilities, values, color=colour, label=loss.__name__)
        grid[1].plot(probabilities, slopes[:, 0], color=colour)
    grid[0].set(xlabel="probability p of the target token", ylabel="loss, nats", ylim=(-0.1, 4))
    grid[0].legend()
    grid[1].set(xlabel="probability p of the target token", ylabel="d loss / d its logit", ylim=(-1.03, 0.03))
    return figure


def split(loss: Callable) -> Callable:
    """A loss with reference as a function of the margin: half of it on the chosen, half off the rejected response."""
    return against(lambda policy: loss(policy, jnp.zeros_like(policy), beta=BETA))


def against(loss: Callable, mean: float = 0.0) -> Callable:
    """A loss of `[B, 2]` as a function of `[B]` differences, around the same mean of both columns."""
    return lambda margin: loss(mean + jnp.stack([margin / 2, -margin / 2], axis=-1))


def value_and_slope(loss: Callable, x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The values of a loss of independent examples, and its gradient by each."""
    return np.asarray(loss(x)), np.asarray(jax.grad(lambda y: loss(y).sum())(x))


def loss_and_slope(curves: Mapping[str, Callable], grid: np.ndarray, **limits: tuple[float, float]) -> Figure:
    """A picture of two panels."""
    figure, axes = panels(1, 2, 3.2)
    fill(axes, curves, grid, **limits)
    return figure


def fill(
    row: Sequence[Axes],
    curves: Mapping[str, Callable],
    grid: np.ndarray,
    *,
    loss_limits: tuple[float, float] | None = None,
    slope_limits: tuple[float, float] | None = None,
    across: str = "margin",
    unit: str = "nats",
    first_colour: int = 0,
) -> None:
    """Draws losses into the left and their derivatives into the right of two panels."""
    left, right = row
    for axes, limits in ((left, loss_limits), (right, slope_limits)):
        axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
        axes.set(xlabel=f"{across}, {unit}", xlim=(grid[0], grid[-1]), **({"ylim": limits} if limits else {}))
    for (name, loss), colour in zip(curves.items(), SERIES[first_colour:], strict=False):
        values, slopes = value_and_slope(loss, jnp.asarray(grid, jnp.float32))
        left.plot(grid, values, color=colour, label=name)
        right.plot(grid, slopes, color=colour)
    right.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    left.set_ylabel("loss")
    right.set_ylabel(f"d loss / d {across}")
    left.legend(fontsize=8.5, handlelength=1.4, labelspacing=0.25, borderaxespad=0.2)


def new_figure(height: float) -> Figure:
    """An empty figure of the gallery's width."""
    figure = Figure(figsize=(WIDTH, height), dpi=PIXELS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(rows: int, columns: int, height: float, **shared: bool) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of panels; a single row is flat."""
    figure = new_figure(height)
    return figure, figure.subplots(rows, columns, **shared)


def save(figure: Figure, name: str, colours: int = 32) -> None:
    """Writes a picture with a small palette, which makes it small; the same bytes in every run."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    image = Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    path = IMAGES / f"losses_{name}.png"
    image.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
