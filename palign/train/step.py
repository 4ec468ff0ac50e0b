"""The training step: one jitted function from (state, frozen models, batch) to (state, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from palign.objectives.base import Objective
from palign.objectives.registry import total_loss
from palign.sharding.mesh import SHARED, row_sharding
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
) -> Step:
    """Makes `step(state, aux, batch) -> (state, metrics)`, compiled once for all steps.

    The objective's denominators are summed over the whole global batch first; then one float32 accumulator takes the
    gradient of sum_i weight_i * term_i / count_i over the micro-batches, so any micro-batching gives the same update.
    A loss or gradient that is not finite leaves parameters and optimizer as they were and is counted in the state.

    Args:
        objective: what to minimise.
        tx: from gradients to updates.
        mesh: the devices.
        shardings: of the state (`state.state_shardings`).
        aux_shardings: of the frozen models, by role.

    Returns:
        The step. `batch` has leaves `[A, R, ...]`; the state is donated.
    """

    def step(state: TrainState, aux: Mapping[str, Any], batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        counts = sum_micro_batches(lambda micro: objective.counts(micro), batch)
        total, gradient, metrics = _accumulate(objective, state.params, aux, batch, counts)
        norm = global_norm(gradient)
        updates, opt_state = tx.update(_cast_like(gradient, state.params), state.opt_state, state.params)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        metrics["loss"] = Mean(total, jnp.float32(1))
        metrics["grad_norm"] = Mean(norm, jnp.float32(1))
        metrics["num_tokens"] = Mean(jnp.sum(batch.group > 0).astype(jnp.float32), jnp.float32(1))
        nonfinite = jnp.where(finite, 0, state.nonfinite + 1)
        metrics["nonfinite"] = Mean(nonfinite.astype(jnp.float32), jnp.float32(1))
        return TrainState(
            state.step + 1,
            keep(optax.apply_updates(state.params, updates), state.params),
            keep(opt_state, state.opt_state),
            nonfinite,
        ), metrics

    whole, rows = NamedSharding(mesh, SHARED), row_sharding(mesh, axis=1)
    compiled = jax.jit(
        step,
        in_shardings=(shardings, dict(aux_shardings), rows),
        out_shardings=(shardings, whole),
        donate_argnums=(0,),
    )
    return _in_mesh(compiled, mesh)


def make_eval_step(
    objective: Objective, mesh: Mesh, params_shardings: Any, aux_shardings: Mapping[str, Any]
) -> Callable:
    """Makes `evaluate(params, aux, batch) -> metrics`, summed over the batch, to be added over batches."""

    def evaluate(params: Any, aux: Mapping[str, Any], batch: Batch) -> dict[str, Mean]:
        def one(micro):
            counts, out = objective.counts(micro), objective.loss(params, aux, micro)
            terms = {f"loss/{name}": Mean(out.terms[name], counts[name]) for name in counts}
            return out.metrics | terms

        return sum_micro_batches(one, batch)

    rows = row_sharding(mesh, axis=1)
    compiled = jax.jit(evaluate, in_shardings=(params_shardings, dict(aux_shardings), rows))
    return _in_mesh(compiled, mesh)


def sum_micro_batches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Adds a function's results up over the micro-batches of `[A, R, ...]` leaves."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, function(micro)), None), zeros, batch)[0]


def _accumulate(objective, params, aux, batch, counts) -> tuple[Array, Any, dict[str, Mean]]:
    def loss(params, micro):
        out = objective.loss(params, aux, micro)
        return total_loss(objective, out.terms, counts), out.metrics

    def one(micro):
        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, micro)
        return total, jax.tree.map(lambda g: g.astype(jnp.float32), gradient), metrics

    if batch.token.shape[0] == 1:
        return one(jax.tree.map(lambda x: x[0], batch))
    return sum_micro_batches(one, batch)


def _cast_like(tree, like):
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _in_mesh(compiled, mesh):
    def call(*arguments):
        with jax.set_mesh(mesh):
            return compiled(*arguments)

    call.compiled = compiled  # tests read the compiled program and count compilations
    return call
