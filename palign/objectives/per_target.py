"""What methods read of every target besides its log-probability, computed chunk by chunk with it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palign import losses
from palign.heads.target_values import TokenValues, target_values, values_at_targets
from palign.heads.targets import AnyTower, Tower
from palign.types import Array, Batch


class PerTarget(NamedTuple):
    """A number of a target.

    Attributes:
        value: `(token [c], logits [c, V], *frozen logits [c, V]) -> [c]` float32.
        frozen: the roles of the frozen models, in their order.
    """

    value: Callable[..., Array]
    frozen: tuple[str, ...] = ()


def _alignment(token: Array, logits: Array) -> Array:
    """`log p(token) - log sum_v p_v^2` without gradient: 0 or above for likely tokens (WPO)."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1)
    chosen = jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(2.0 * log_p, axis=-1)


def _reference_kl(token: Array, logits: Array, reference_logits: Array) -> Array:
    """`KL(reference || policy)` (TDPO)."""
    return losses.forward_kl(logits, reference_logits)


def _policy_kl(token: Array, logits: Array, reference_logits: Array) -> Array:
    """`KL(policy || reference)` over the whole vocabulary, without gradient: how far the policy has gone."""
    return losses.reverse_kl(jax.lax.stop_gradient(logits), reference_logits)


PER_TARGET: dict[str, PerTarget] = {
    "alignment": PerTarget(_alignment),
    "policy_kl": PerTarget(_policy_kl, ("reference",)),
    "reference_kl": PerTarget(_reference_kl, ("reference",)),
}


def values_per_target(
    tower: Tower, frozen: Mapping[str, AnyTower], batch: Batch, names: frozenset[str], *, chunk: int
) -> tuple[TokenValues, dict[str, Array]]:
    """The policy's token values and the named extras, all `[R, M]`, in one walk over the targets."""
    ordered = tuple(sorted(names))
    roles = tuple(sorted({role for name in ordered for role in PER_TARGET[name].frozen}))
    towers = (tower, *(frozen[role] for role in roles))
    return target_values(_function(ordered, roles), towers, batch, chunk=chunk)


@functools.cache
def _function(names: tuple[str, ...], roles: tuple[str, ...]) -> Callable[..., Any]:
    def at_targets(token, logits, *frozen_logits):
        by_role = dict(zip(roles, frozen_logits, strict=True))
        extras = {}
        for name in names:
            value, needed = PER_TARGET[name]
            extras[name] = value(token, logits, *(by_role[role] for role in needed))
        return values_at_targets(token, logits), extras

    return at_targets
