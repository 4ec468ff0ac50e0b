"""The small worlds of docs/exact.md, the methods that are trained in them, and their training.

Every response of every prompt is listed, and losses and gradients are expectations. The losses are those of
`palign.losses`, the optima those of `palign.eval.optima`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palign import losses
from palign.eval.enumerate import ResponseSpace, all_responses, along_responses, conditional_logits, response_logps
from palign.eval.optima import (
    Comparisons,
    bradley_terry_preference,
    compare_lists,
    compare_pairs,
    divergence,
    ipo_optimum,
    kl_regularised_optimum,
    soft_value_teacher,
    winner_logps,
)

SEED, PROMPTS, VOCAB, LENGTH, LIST = 0, 4, 3, 3, 3
BETA, BETA0 = 0.5, 1.0
STEPS = 1000
# One grid of step sizes for all methods.
DESCENT = tuple(2.0**k for k in range(-3, 9))
ADAM = (0.003, 0.01, 0.03, 0.1, 0.3)
NEAR = 1e-3  # nats: as good as there
STILL = 1e-6  # of the largest entry of a gradient: at rest


class World(NamedTuple):
    """A reference and a reward for each prompt, and what follows from them."""

    space: ResponseSpace
    ref_logits: jax.Array  # [P, S, V]
    ref: jax.Array  # [P, N] log-probabilities
    rewards: jax.Array  # [P, N]


class Method(NamedTuple):
    """A loss in expectation, and where it should lead."""

    objective: Callable[[jax.Array], jax.Array]  # logits [P, S, V] -> []
    limit: jax.Array | None  # log-probabilities [P, N] of its population optimum; None: where it comes to rest
    setting: str = ""  # chosen on a grid, to name beside the method


class Run(NamedTuple):
    """A method with the step size of the grid that brings it to its limit first."""

    size: float
    steps: int | None  # until within NEAR of its limit
    to_best: np.ndarray  # [T] mean KL to pi* after each step, nats
    limit: jax.Array  # [P, N]


def make_world(length: int = LENGTH, prompts: int = PROMPTS) -> World:
    """Standard normal logits and rewards."""
    space, rng = all_responses(VOCAB, length), np.random.default_rng(SEED)
    ref_logits = jnp.asarray(rng.normal(size=(prompts, *space.child.shape)))
    rewards = jnp.asarray(rng.normal(size=(prompts, space.num_responses)))
    return World(space, ref_logits, response_logps(space, ref_logits), rewards)


class Teachers(NamedTuple):
    """The exact population optima of DPO and of reverse DPO, as tables of log-probabilities `[P, S, V]`."""

    dpo: jax.Array
    reverse: jax.Array
    reference: jax.Array


def teachers(world: World) -> Teachers:
    """What DPO finds at beta0 on the pairs and on the swapped pairs."""
    both = (kl_regularised_optimum(world.ref, sign * world.rewards, beta=BETA0).logps for sign in (1, -1))
    return Teachers(*(conditional_logits(world.space, logps) for logps in (*both, world.ref)))


def extrapolation(beta: float) -> float:
    """The contrastive teacher's ratio that tilts whole responses by r / beta: 1 + 2 ratio = beta0 / beta."""
    return (BETA0 / beta - 1) / 2


def theorem1(world: World, beta: float) -> jax.Array:
    """Logits of Theorem 1's teacher."""
    made = teachers(world)
    return losses.theorem1_teacher(made.dpo, made.reference, ratio=BETA0 / beta).logits


def contrastive(world: World, beta: float) -> jax.Array:
    """Logits of the contrastive teacher."""
    made = teachers(world)
    return losses.contrastive_teacher(made.dpo, made.reverse, ratio=extrapolation(beta)).logits


def with_soft_values(world: World, beta: float) -> jax.Array:
    """Theorem 1's teacher, corrected."""
    return soft_value_teacher(world.space, theorem1(world, beta))


def methods(world: World) -> dict[str, Method]:
    """Every method of the first picture, all on their way to the same optimum if they can reach it."""
    pairs = compare_pairs(bradley_terry_preference(world.rewards), world.ref)
    lists = compare_lists(world.rewards, world.ref, size=LIST)
    best = kl_regularised_optimum(world.ref, world.rewards, beta=BETA).logps
    made, tau, scale, away = teachers(world), nearest_tau(world), nearest_scale(world), extrapolation(BETA)
    adaptive = losses.adaptive_teacher(made.dpo, made.reverse, scale=scale).logits
    corrected = {
        "theorem1": with_soft_values(world, BETA),
        "contrastive": soft_value_teacher(world.space, contrastive(world, BETA)),
    }

    def distilled(loss, teacher):
        return Method(on_policy(world, loss), response_logps(world.space, teacher))

    return {
        "dpo": Method(on_pairs(world, losses.dpo, pairs, BETA), best),
        "ipo_sum": Method(on_pairs(world, losses.ipo, pairs, tau), ipo_limit(world, tau), f", `beta` {tau:.2g}"),
        "plackett_luce": Method(on_lists(world, losses.plackett_luce, lists), best),
        "lipo_lambda": Method(on_lists(world, losses.lipo_lambda, lists), None),
        "sft": Method(on_winners(world, lists), winner_logps(lists, world.space.num_responses)),
        "aligndistil_theorem1": distilled(
            lambda z: losses.aligndistil_theorem1(z, made.dpo, made.reference, beta=BETA, beta0=BETA0),
            theorem1(world, BETA),
        ),
        "aligndistil_contrastive": distilled(
            lambda z: losses.aligndistil_contrastive(z, made.dpo, made.reverse, beta=BETA0 / away, beta0=BETA0),
            contrastive(world, BETA),
        ),
        "aligndistil": distilled(
            lambda z: losses.aligndistil(z, made.dpo, made.reverse, beta0=BETA0, scale=scale), adaptive
        )._replace(setting=f", `scale` {scale:.2g}"),
        "theorem1 + soft values": distilled(
            lambda z: BETA * losses.reverse_kl(z, corrected["theorem1"]), corrected["theorem1"]
        ),
        "contrastive + soft values": distilled(
            lambda z: BETA0 / away * losses.reverse_kl(z, corrected["contrastive"]), corrected["contrastive"]
        ),
    }


def on_pairs(world: World, loss: Callable, law: Comparisons, beta: float) -> Callable:
    """The expectation of a pairwise loss, summed over prompts."""

    def objective(logits):
        policy, ref = (logps[:, law.responses].reshape(-1, 2) for logps in (now(world, logits), world.ref))
        return law.probability.reshape(-1) @ loss(policy, ref, beta=beta)

    return objective


def on_lists(world: World, loss: Callable, law: Comparisons) -> Callable:
    """The expectation of a listwise loss; labels fall from 1 to 0 in even steps by rank."""
    labels = jnp.broadcast_to(jnp.linspace(1.0, 0.0, LIST), (law.probability.size, LIST))

    def objective(logits):
        policy, ref = (logps[:, law.responses].reshape(-1, LIST) for logps in (now(world, logits), world.ref))
        return law.probability.reshape(-1) @ loss(policy, ref, labels, labels >= 0, beta=BETA)

    return objective


def on_winners(world: World, law: Comparisons) -> Callable:
    """The expectation of the negative log-likelihood of the best response of a list."""

    def objective(logits):
        return (law.probability * losses.nll(now(world, logits)[:, law.responses[:, 0]])).sum()

    return objective


def on_policy(world: World, loss: Callable) -> Callable:
    """The expectation over the policy's own responses of the mean loss of their tokens; drawing has no gradient."""

    def objective(logits):
        drawn = jax.lax.stop_gradient(jnp.exp(now(world, logits)))
        return (drawn * along_responses(world.space, loss(logits)) / world.space.lengths[None]).sum()

    return objective


def now(world: World, logits: jax.Array) -> jax.Array:
    """Log-probabilities `[P, N]` under the table in training."""
    return response_logps(world.space, logits)


def ipo_limit(world: World, tau: float) -> jax.Array:
    """IPO's population optimum."""
    return ipo_optimum(world.ref, bradley_terry_preference(world.rewards), world.ref, beta=tau)


def nearest_tau(world: World) -> float:
    """IPO's beta whose population optimum is nearest to pi*."""
    return nearest(world, np.geomspace(0.02, 1, 400), lambda tau: ipo_limit(world, tau))


def nearest_scale(world: World) -> float:
    """AlignDistil's scale whose teacher is nearest to pi*."""
    made = teachers(world)

    def adaptive(scale):
        return now(world, losses.adaptive_teacher(made.dpo, made.reverse, scale=scale).logits)

    return nearest(world, np.geomspace(0.1, 10, 400), adaptive)


def nearest(world: World, grid: np.ndarray, found: Callable) -> float:
    """The setting on a grid with which a method's limit is nearest to pi*."""
    best = kl_regularised_optimum(world.ref, world.rewards, beta=BETA).logps
    distances = jax.lax.map(lambda setting: divergence(found(setting), best).mean(), jnp.asarray(grid))
    return float(grid[int(distances.argmin())])


def gap(world: World, logps: jax.Array) -> float:
    """KL to pi*, mean over prompts, nats."""
    return float(divergence(logps, kl_regularised_optimum(world.ref, world.rewards, beta=BETA).logps).mean())


def fastest(world: World, method: Method, sizes: Sequence[float], optimiser: Callable) -> Run:
    """Trains from the reference with every step size and keeps the one that comes near the method's limit first."""
    gradient = jax.grad(method.objective)

    @jax.jit
    @jax.vmap
    def train(size):
        update = optimiser(size)

        def step(carry, _):
            logits, state = carry
            slope = gradient(logits)
            change, state = update.update(slope, state)
            return (logits + change, state), (now(world, logits + change), jnp.abs(slope).max())

        return jax.lax.scan(step, (world.ref_logits, update.init(world.ref_logits)), None, length=STEPS)[1]

    paths, slopes = train(jnp.asarray(sizes))  # [sizes, T, P, N], [sizes, T]
    limit = resting_place(paths[:, -1], slopes[:, -1]) if method.limit is None else method.limit
    distances = np.asarray(divergence(paths, jnp.broadcast_to(limit, paths.shape)).mean(-1))
    arrivals = [arrival(path) for path in distances]
    best = min(range(len(sizes)), key=lambda i: (arrivals[i] is None, arrivals[i] or 0, distances[i, -1]))
    target = kl_regularised_optimum(world.ref, world.rewards, beta=BETA).logps
    to_best = np.asarray(divergence(paths[best], jnp.broadcast_to(target, paths[best].shape)).mean(-1))
    return Run(sizes[best], arrivals[best], to_best, limit)


def resting_place(ends: jax.Array, slopes: jax.Array) -> jax.Array:
    """The end of the path whose gradient is smallest, for a loss whose stationary point has no closed form."""
    slopes = jnp.where(jnp.isfinite(slopes), slopes, jnp.inf)
    if slopes.min() > STILL:
        raise ValueError(f"no step size comes to rest: the smallest gradient is {slopes.min():.1e}; take more steps")
    return ends[int(slopes.argmin())]


def arrival(distances: np.ndarray) -> int | None:
    """The number of steps after which the distance stays below NEAR, or None."""
    far = np.flatnonzero(~(distances < NEAR))
    steps = int(far[-1]) + 2 if far.size else 1
    return steps if steps <= len(distances) else None
