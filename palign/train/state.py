"""The train state: everything a step changes, and where it lives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from palign.models.protocol import LanguageModel, Params
from palign.sharding.mesh import SHARED
from palign.sharding.rules import parameter_shardings

InitCarry = Callable[[], dict[str, Any]]


class TrainState(NamedTuple):
    """What a step takes and gives back.

    Attributes:
        step: [] int32, steps finished.
        params: trained leaves only; frozen models travel in `aux`.
        opt_state: the optimizer's.
        nonfinite: [] int32, how many steps in a row were not finite and left the rest unchanged.
        carry: what methods remember between steps, by method; empty for most.
    """

    step: Any
    params: Params
    opt_state: Any
    nonfinite: Any
    carry: dict[str, Any]


def new_state(params: Params, tx: optax.GradientTransformation, init_carry: InitCarry = dict) -> TrainState:
    """A state that has not taken a step."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.zeros((), jnp.int32), init_carry())


def state_shardings(
    mesh: Mesh, lm: LanguageModel, tx: optax.GradientTransformation, init_carry: InitCarry = dict
) -> TrainState:
    """A sharding for every leaf of the state; the optimizer's copies of parameters follow the parameters."""
    whole = NamedSharding(mesh, SHARED)
    shapes = jax.eval_shape(lambda key: new_state(lm.init(key), tx, init_carry), jax.random.key(0))
    params = parameter_shardings(mesh, shapes.params)

    def follow(leaf, shape, sharding):
        return sharding if leaf.shape == shape.shape else whole  # factored moments are small: not cut

    opt_state = optax.tree_utils.tree_map_params(
        tx, follow, shapes.opt_state, shapes.params, params, transform_non_params=lambda _: whole
    )
    return TrainState(whole, params, opt_state, whole, jax.tree.map(lambda _: whole, shapes.carry))


def init_state(
    mesh: Mesh,
    lm: LanguageModel,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    params: Params | None = None,
    init_carry: InitCarry = dict,
) -> TrainState:
    """A fresh state in its place: random weights from `seed`, or a copy of `params`.

    The copy matters: the step donates the state, and a buffer that is also a frozen model's must not be given away.
    """
    shardings = state_shardings(mesh, lm, tx, init_carry)
    with jax.set_mesh(mesh):
        if params is None:
            fresh = jax.jit(lambda key: new_state(lm.init(key), tx, init_carry), out_shardings=shardings)
            return fresh(jax.random.key(seed))
        copied = jax.tree.map(jnp.copy, params)
        return jax.jit(lambda p: new_state(p, tx, init_carry), out_shardings=shardings)(copied)
