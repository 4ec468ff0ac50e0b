"""The training step of a config, with shapes for arguments: nothing is read, initialised or allocated."""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from palign.config.schema import DataConfig, RunConfig
from palign.data.pack import RowShape, pack_row, row_shape, tree_tokens
from palign.data.tokenize import TokenTree
from palign.models.config import dtype_on
from palign.models.protocol import LanguageModel
from palign.models.transformer import make_language_model
from palign.objectives.base import REFERENCE, Objective
from palign.objectives.lora import BASE
from palign.objectives.readings import WEIGHTS
from palign.objectives.registry import find_method
from palign.sharding.mesh import CONTEXT_AXIS, make_mesh, num_row_shards, row_sharding
from palign.sharding.rules import FROZEN_SHARDINGS, parameter_shardings
from palign.train.build import check_config, check_rows, objective_of
from palign.train.followers import followers_of
from palign.train.kernel import PLAIN, find_candidates
from palign.train.models import with_factors
from palign.train.optimizer import make_optimizer
from palign.train.sources import without_value_head
from palign.train.state import TrainState, new_state, state_shardings
from palign.train.step import make_train_step
from palign.types import Batch

STEPS = 1000  # of a run whose data are not there to say; only the schedule's constants follow from it


class AbstractStep(NamedTuple):
    """A step that can be compiled, and what it would be called with."""

    config: RunConfig  # with the compute type that the devices have
    mesh: Mesh
    objective: Objective
    row: Batch  # one row as the plan assumes it, numpy
    state: TrainState  # shapes with shardings, like the two that follow
    aux: dict[str, Any]
    batch: Batch
    compiled: Any  # the jitted function

    @property
    def rows_per_device(self) -> float:
        """Of one micro-batch; a part of one where rows are cut."""
        return self.batch.token.shape[1] / (num_row_shards(self.mesh) * self.mesh.shape.get(CONTEXT_AXIS, 1))


def abstract_step(config: RunConfig, devices: list[jax.Device], *, responses: int = 0) -> AbstractStep:
    """Builds the step that `train.build` would build, of shapes.

    Args:
        config: of one run; `model.vocab_size` must be set, for there is no tokenizer.
        devices: to be compiled for; they need not exist.
        responses: most responses of an example, which the data would say; 0 = 2 where a method compares, else 1.

    Raises:
        ValueError: what training with this config on so many devices would say.
    """
    if not config.model.vocab_size:
        raise ValueError("config.model.vocab_size = 0: a plan has no tokenizer to ask; set it")
    check_config(config)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    check_rows(config, mesh)
    dtype = dtype_on(devices[0]) if config.model.dtype == "auto" else config.model.dtype
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    find_candidates(config.attention.kernel, devices[0].platform)
    kernel = PLAIN if config.attention.kernel == "auto" else config.attention.kernel  # nothing is there to measure
    lm, trunk = (make_language_model(model, kernel) for model in (config.model, without_value_head(config.model)))
    sources = {BASE: config.init_from, REFERENCE: config.reference_from or config.init_from}
    trained, objective = with_factors(config, lm, objective_of(config, lm), sources)
    tx, followers = make_optimizer(config.optimizer, config.train.max_steps or STEPS), followers_of(config)
    shardings = state_shardings(mesh, trained, tx, objective.init_carry, followers)

    def init(key: jax.Array) -> TrainState:
        params = trained.init(key)
        return new_state(params, tx, objective.init_carry, dict.fromkeys(followers, params))

    aux = _frozen(config, mesh, trunk, objective.frozen - followers.keys())
    places = jax.tree.map(lambda leaf: leaf.sharding, aux)
    step: Any = make_train_step(objective, tx, mesh, shardings, places, followers)
    shapes = jax.eval_shape(init, jax.random.key(0))
    row = assumed_row(config, responses or default_responses(config))
    batch = _batch(config, mesh, row, objective)
    return AbstractStep(config, mesh, objective, row, _placed(shapes, shardings), aux, batch, step.compiled)


def default_responses(config: RunConfig) -> int:
    """How many responses an example has where nobody says."""
    compares = any(find_method(name).compares for name in config.objective.loss_type)
    return 2 if compares and config.data.records != "best_response" else 1


def assumed_row(config: RunConfig, responses: int) -> Batch:
    """A full row of equal trees: prompt and responses equally long, at most `max_length` together.

    Args:
        config: of the run.
        responses: of every tree.

    Returns:
        A row without the axis R.

    Raises:
        ValueError: a tree of one-token parts does not fit the row.
    """
    data, length = config.data, _part_length(config.data, responses)
    mismatched = any(find_method(name).mismatched for name in config.objective.loss_type)
    shape = _row_shape(data, responses + mismatched)
    parts = tree_tokens(1, [1] * responses, data.layout)
    tokens = np.ones(length, np.int32)
    scores = tuple(float(k) for k in range(responses))
    tree = TokenTree(tokens, (tokens,) * responses, scores, 0)
    count = min(shape.trees, shape.tokens // (parts * length))
    weights = [1.0] * count if any(WEIGHTS in find_method(name).reads for name in config.objective.loss_type) else None
    return pack_row([tree] * count, shape, data.pair_policy, data.layout, seed=0, weights=weights)


def _part_length(data: DataConfig, responses: int) -> int:
    """The longest part, up to half of `max_length`, of which whole trees fill a row."""
    parts, longest = tree_tokens(1, [1] * responses, data.layout), max(data.max_length // 2, 1)
    trees = 1 if data.packing == "one_per_row" else -(-data.row_length // (parts * longest))
    length = min(longest, data.row_length // (parts * trees))
    if not length:
        raise ValueError(
            f"config.data.row_length = {data.row_length} has no room for a prompt and {responses} responses; raise it"
        )
    return length


def _row_shape(data: DataConfig, responses: int) -> RowShape:
    trees = 1 if data.packing == "one_per_row" else data.trees_per_row
    return row_shape(data.row_length, trees=trees, responses=responses, pair_policy=data.pair_policy, block=data.block)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)


def _frozen(config: RunConfig, mesh: Mesh, trunk: LanguageModel, roles: Collection[str]) -> dict[str, Any]:
    """The frozen models; of one whose hidden states are cached, the unembedding alone."""

    def init(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(config.frozen.dtype or x.dtype), trunk.init(key))

    shapes = jax.eval_shape(init, jax.random.key(0))
    whole = _placed(shapes, FROZEN_SHARDINGS[config.frozen.placement](mesh, shapes))
    if config.objective.teachers == "cached":
        kernel = {"unembedding": jax.eval_shape(lambda params: trunk.unembed(params).kernel, shapes)}
        unembedding = _placed(kernel, parameter_shardings(mesh, kernel))["unembedding"]
        return {role: whole if role == BASE else unembedding for role in sorted(roles)}
    return dict.fromkeys(sorted(roles), whole)


def _batch(config: RunConfig, mesh: Mesh, row: Batch, objective: Objective) -> Batch:
    data, targets = config.data, row.target_token.shape
    if config.objective.reference == "cached":
        row = row._replace(reference_logps=np.zeros(targets, np.float32))
    if config.objective.teachers == "cached":
        hidden = jax.ShapeDtypeStruct((*targets, config.model.dim), config.model.dtype)
        row = row._replace(hidden=dict.fromkeys(sorted(objective.frozen - {BASE}), hidden))
    leading, place = (data.micro_batches, data.rows_per_step // data.micro_batches), row_sharding(mesh, axis=1)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leading + leaf.shape, leaf.dtype, sharding=place), row)
