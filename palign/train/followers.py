"""Models that follow the policy, in the train state: an average for evaluation (EMA), a reference that moves (TR-DPO).

Gorbatovski et al., Learn Your Reference Model for Real Good Alignment (TR-DPO), arXiv 2404.09656, equations 4
(soft) and 5 (hard).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from palign.config.schema import RunConfig
from palign.models.protocol import Params
from palign.objectives.base import REFERENCE
from palign.types import Array

EMA = "ema"  # the role of the policy's moving average


class Follower(NamedTuple):
    """Every `every` steps a model becomes `rate * policy + (1 - rate) * itself`; rate 1 copies the policy."""

    every: int
    rate: float


def followers_of(config: RunConfig) -> dict[str, Follower]:
    """Role -> how that model follows, of the models that the config asks for."""
    decay, every = config.train.ema_decay, config.objective.reference_sync_every
    ema = {EMA: Follower(1, 1 - decay)} if decay else {}
    return ema | ({REFERENCE: Follower(every, config.objective.reference_mixup)} if every else {})


def follow(
    followers: Mapping[str, Follower], models: Mapping[str, Params], policy: Params, step: Array
) -> dict[str, Params]:
    """The models after a step.

    Args:
        followers: how each follows, by role.
        models: their parameters before, by role.
        policy: the policy's, after the step.
        step: [] how many steps are finished, this one included.
    """

    def moved(follower: Follower, model: Params) -> Params:
        due, rate = step % follower.every == 0, follower.rate
        return jax.tree.map(lambda m, p: jnp.where(due, rate * p + (1 - rate) * m, m), model, policy)

    return {role: moved(follower, models[role]) for role, follower in followers.items()}
