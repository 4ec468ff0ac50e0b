"""An objective of LoRA factors: the same methods, on the frozen base with the factors beside its kernels."""

from collections.abc import Mapping
from typing import Any

from palign.config.schema import LoraConfig
from palign.models.lora import attach
from palign.models.protocol import Params
from palign.objectives.base import Context, Objective
from palign.types import Batch, Terms

BASE = "base"  # the role of the frozen model that factors are trained on


def with_base(objective: Objective, config: LoraConfig, shared: frozenset[str] = frozenset()) -> Objective:
    """The objective as a function of the factors alone, with the base in `aux`.

    Args:
        objective: of all the model's parameters.
        config: of the factors.
        shared: frozen roles that the base itself plays (the reference), so that it is in memory once.
    """

    def models(factors: Params, aux: Mapping[str, Any]) -> tuple[Params, dict[str, Any]]:
        return attach(aux[BASE], factors, config), {**aux, **dict.fromkeys(shared, aux[BASE])}

    def loss(factors: Params, aux: Mapping[str, Any], batch: Batch, context: Context) -> Terms:
        return objective.loss(*models(factors, aux), batch, context)

    def statistics(factors: Params, aux: Mapping[str, Any], batch: Batch) -> Any:
        assert objective.statistics is not None
        return objective.statistics(*models(factors, aux), batch)

    return objective._replace(
        frozen=objective.frozen - shared | {BASE},
        loss=loss,
        statistics=statistics if objective.statistics else None,
    )
