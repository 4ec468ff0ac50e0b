"""The train state: everything a step changes, and where it lives."""

from collections.abc import Callable, Collection, Mapping
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
        models: other models that change, by role: those that follow the policy.
    """

    step: Any
    params: Params
    opt_state: Any
    nonfinite: Any
    carry: dict[str, Any]
    models: dict[str, Params]


def new_state(
    params: Params,
    tx: optax.GradientTransformation,
    init_carry: InitCarry = dict,
    models: Mapping[str, Params] | None = None,
) -> TrainState:
    """A state that has not taken a step."""
    step, nonfinite = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two buffers: the state is donated
    return TrainState(step, params, tx.init(params), nonfinite, init_carry(), dict(models or {}))


def state_shardings(
    mesh: Mesh,
    lm: LanguageModel,
    tx: optax.GradientTransformation,
    init_carry: InitCarry = dict,
    roles: Collection[str] = (),
) -> TrainState:
    """A sharding for every leaf of the state; the optimizer's copies, and models by role, lie as the parameters do."""
    whole = NamedSharding(mesh, SHARED)
    shapes = jax.eval_shape(lambda key: new_state(lm.init(key), tx, init_carry), jax.random.key(0))
    params = parameter_shardings(mesh, shapes.params)

    def follow(leaf, shape, sharding):
        return sharding if leaf.shape == shape.shape else whole  # factored moments are small: not cut

    opt_state = optax.tree_utils.tree_map_params(
        tx, follow, shapes.opt_state, shapes.params, params, transform_non_params=lambda _: whole
    )
    carry = jax.tree.map(lambda _: whole, shapes.carry)
    return TrainState(whole, params, opt_state, whole, carry, dict.fromkeys(roles, params))


def init_state(
    mesh: Mesh,
    lm: LanguageModel,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    params: Params | None = None,
    init_carry: InitCarry = dict,
    models: Mapping[str, Params | None] | None = None,
) -> TrainState:
    """A fresh state in its place: random weights from `seed`, or a copy of `params`; `models` start there or as given.

    Copies matter: the step donates the state, and a buffer that is also a frozen model's must not be given away.
    """
    shardings = state_shardings(mesh, lm, tx, init_carry, (models or {}).keys())
    with jax.set_mesh(mesh):
        if params is None:
            params = jax.jit(lm.init, out_shardings=shardings.params)(jax.random.key(seed))
        else:
            params = jax.tree.map(jnp.copy, params)
        others = {role: jax.tree.map(jnp.copy, start or params) for role, start in (models or {}).items()}
        return jax.jit(lambda p, m: new_state(p, tx, init_carry, m), out_shardings=shardings)(params, others)
