"""The training step: one jitted function from (state, frozen models, batch) to (state, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from palign.objectives.base import Context, Objective
from palign.objectives.compose import total_loss
from palign.sharding.mesh import SHARED, row_sharding
from palign.train.followers import Follower, follow
from palign.train.optimizer import global_norm
from palign.train.state import TrainState
from palign.types import Array, Batch, Mean

Step = Callable[[TrainState, Mapping[str, Any], Batch], tuple[TrainState, dict[str, Mean]]]


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    aux_shardings: Mapping[str, Any],
    followers: Mapping[str, Follower] | None = None,
) -> Step:
    """Makes `step(state, aux, batch) -> (state, metrics)`, compiled once for all steps.

    The objective's denominators are summed over the whole global batch first; then one float32 accumulator takes the
    gradient of sum_i weight_i * term_i / count_i over the micro-batches, so any micro-batching gives the same update.
    Where a method asks for numbers of the whole batch, a forward-only pass over it comes before; what methods remember
    is updated after.
    A loss or gradient that is not finite leaves parameters and optimizer as they were and is counted in the state.

    Args:
        objective: what to minimise.
        tx: from gradients to updates.
        mesh: the devices.
        shardings: of the state (`state.state_shardings`).
        aux_shardings: of the frozen models, by role.
        followers: how the state's other models follow the policy, by role; the objective finds them beside the frozen.

    Returns:
        The step. `batch` has leaves `[A, R, ...]`; the state is donated.
    """

    def step(state: TrainState, aux: Mapping[str, Any], batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        aux = {**aux, **state.models}
        counts = sum_micro_batches(lambda micro: objective.counts(micro), batch)
        statistics = measure_batch(objective, state.params, aux, batch)
        total, gradient, metrics, seen = _accumulate(objective, state, aux, batch, statistics, counts)
        norm = global_norm(gradient)
        updates, opt_state = tx.update(_cast_like(gradient, state.params), state.opt_state, state.params)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params = keep(optax.apply_updates(state.params, updates), state.params)
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=keep(opt_state, state.opt_state),
            nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
            carry=keep(objective.update_carry(state.carry, seen), state.carry),
            models=keep(follow(followers or {}, state.models, params, state.step + 1), state.models),
        )
        numbers = {"loss": total, "grad_norm": norm, "num_tokens": jnp.sum(batch.group > 0), "nonfinite": new.nonfinite}
        return new, metrics | {name: Mean(x.astype(jnp.float32), jnp.float32(1)) for name, x in numbers.items()}

    whole, rows = NamedSharding(mesh, SHARED), row_sharding(mesh, axis=1)
    places = (shardings, dict(aux_shardings), rows)
    compiled = jax.jit(step, in_shardings=places, out_shardings=(shardings, whole), donate_argnums=(0,))
    return _in_mesh(compiled, mesh)


def make_eval_step(
    objective: Objective, mesh: Mesh, params_shardings: Any, aux_shardings: Mapping[str, Any]
) -> Callable:
    """Makes `evaluate(params, carry, aux, batch) -> metrics`, summed over the batch, to be added over batches."""

    def evaluate(params: Any, carry: dict[str, Any], aux: Mapping[str, Any], batch: Batch) -> dict[str, Mean]:
        def one(micro, statistics):
            counts, out = objective.counts(micro), objective.loss(params, aux, micro, Context(statistics, carry))
            terms = {f"loss/{name}": Mean(out.terms[name], counts[name]) for name in counts}
            return out.metrics | terms

        return sum_micro_batches(one, batch, measure_batch(objective, params, aux, batch))

    rows, whole = row_sharding(mesh, axis=1), NamedSharding(mesh, SHARED)
    compiled = jax.jit(evaluate, in_shardings=(params_shardings, whole, dict(aux_shardings), rows))
    return _in_mesh(compiled, mesh)


def measure_batch(objective: Objective, params: Any, aux: Mapping[str, Any], batch: Batch) -> dict[str, Array]:
    """Statistics of the whole batch, `[A, ...]`: one slice for each micro-batch; nothing is run where none is asked."""
    if objective.statistics is None:
        return {}
    measure = objective.statistics
    stacked = jax.lax.scan(lambda _, micro: (None, measure(params, aux, micro)), None, batch)[1]
    return jax.lax.stop_gradient(objective.combine(stacked))


def sum_micro_batches(function: Callable[..., Any], *trees: Any) -> Any:
    """Adds a function's results up over the micro-batches of trees with leaves `[A, ...]`."""
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], trees))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, function(*micro)), None), zeros, trees)[0]


def _accumulate(objective, state, aux, batch, statistics, counts) -> tuple[Array, Any, dict[str, Mean], dict[str, Any]]:
    def loss(params, micro, statistics):
        out = objective.loss(params, aux, micro, Context(statistics, state.carry))
        return total_loss(objective, out.terms, counts), (out.metrics, out.observations)

    def one(micro, statistics):
        (total, (metrics, seen)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, micro, statistics)
        return total, jax.tree.map(lambda g: g.astype(jnp.float32), gradient), metrics, seen

    if batch.token.shape[0] == 1:
        return one(*jax.tree.map(lambda x: x[0], (batch, statistics)))
    return sum_micro_batches(one, batch, statistics)


def _cast_like(tree, like):
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _in_mesh(compiled, mesh):
    def call(*arguments):
        with jax.set_mesh(mesh):
            return compiled(*arguments)

    call.compiled = compiled  # tests read the compiled program and count compilations
    return call
