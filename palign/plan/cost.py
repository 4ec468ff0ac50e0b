"""What a step costs, computed from the config: products, bytes through memory, and the time that peaks allow.

The compiler's own count takes a loop's body once, so FLOPs are counted here: matrix products and attention, nothing
else. A pass is one forward through the layers. The backward of a product is two more of its size; rematerialisation
repeats the forward.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from palign.config.schema import ModelConfig
from palign.models.config import layer_tables, padded_vocabulary
from palign.objectives.base import REFERENCE, Needs
from palign.objectives.registry import find_method, needs_of
from palign.plan.program import Collective
from palign.plan.step import AbstractStep
from palign.plan.topology import Chip
from palign.sharding.rules import HOST
from palign.train.build import diagnosis_of
from palign.types import Batch

# config.model.remat -> forwards of the layers' products, and of attention, that the backward repeats
RECOMPUTED = {"none": (0, 0), "dots": (0, 0), "attention": (1, 0), "full": (1, 1)}


class Passes(NamedTuple):
    """How often a step goes through the layers, and multiplies targets with an unembedding.

    Attributes:
        model: forwards that the method asks for; a backward counts as two.
        policy: the policy's, a backward as two, or as one where LoRA's factors are trained.
        recomputed: forwards of the policy's products that its backward repeats, but for each layer's last product.
        attended: the same of attention.
        frozen: forwards of frozen models.
        head_model: products of targets and unembedding that the method asks for.
        head: the same as they are run.
    """

    model: int
    policy: int
    recomputed: int
    attended: int
    frozen: int
    head_model: int
    head: int


class Forward(NamedTuple):
    """Floating-point operations that one pass through rows asks for.

    Attributes:
        layers: products of real tokens with the layers' weights.
        attention: products of queries with the keys that the tree rule shows them, and of the weights with the values.
        head: products of targets with the unembedding.
    """

    layers: float
    attention: float
    head: float


class Work(NamedTuple):
    """One step on one device.

    Attributes:
        model_flops: what the method asks for, whatever is recomputed: the numerator of MFU.
        flops: what is run.
        memory_bytes: through the device's memory: weights, optimizer, activations between products, the heads' kernel
            and its gradient once a chunk. Scores of the XLA form of attention are left out.
    """

    model_flops: float
    flops: float
    memory_bytes: float


class Times(NamedTuple):
    """Seconds of a step at the peaks of a chip, each as if nothing else were done."""

    compute: float
    memory: float
    links: float
    network: float

    @property
    def overlapped(self) -> float:
        """All at once: no step is shorter."""
        return max(self)

    @property
    def one_after_another(self) -> float:
        """Nothing at once, at the same peaks."""
        return sum(self)


def passes_of(step: AbstractStep) -> Passes:
    """Counts the passes of a step."""
    settings = step.config.objective
    needs, methods = needs_of(settings.loss_type), [find_method(name) for name in settings.loss_type]
    diagnosis = diagnosis_of(settings)
    needs |= diagnosis.needs if diagnosis else Needs()
    asked = needs.reference and settings.reference == "live"
    frozen = len(needs.frozen | ({REFERENCE} if asked else set())) if settings.teachers == "live" else 0
    # Values of targets are recomputed in the backward, with those of every frozen model beside them: products twice.
    values = needs.logps or bool(needs.per_target)
    beside = len(needs.frozen) if needs.per_target else 0
    # Sums over targets take the gradient in the forward.
    sums = [m for m in methods if m.distils or (m.view is None and not values)]
    products = 3 - bool(step.config.lora.rank)  # a frozen kernel has no gradient; the factors' products are left out
    summed = sum(products + len(m.frozen) for m in sums)
    before = step.objective.statistics is not None  # a forward of its own over the whole batch
    recomputed, attended = RECOMPUTED[step.config.model.remat]
    return Passes(
        model=products + frozen + before * (1 + frozen),
        policy=products + before,
        recomputed=recomputed,
        attended=attended,
        frozen=frozen * (1 + before),
        head_model=products * values + beside + asked + summed + before * (1 + asked),
        head=(products + 1) * values + 2 * beside + asked + summed + before * (1 + asked),
    )


def forward_of(model: ModelConfig, rows: Batch) -> Forward:
    """Counts what a forward pass asks for, whatever is padded or recomputed.

    Args:
        model: the architecture.
        rows: with any leading axes.
    """
    context = rows.position[rows.group > 0] + 1
    tables, _ = layer_tables(model)
    seen = sum(float(np.minimum(context, window).sum()) for window in tables.window)
    return Forward(
        layers=2.0 * layer_products(model) * context.size,
        attention=4.0 * model.num_heads * model.head_width * seen,
        head=2.0 * model.dim * padded_vocabulary(model) * int(np.sum(rows.target_slot > 0)),
    )


def work_of(step: AbstractStep) -> Work:
    """Counts products and bytes of a step on one device."""
    model, row, passes = step.config.model, step.row, passes_of(step)
    rows, cut = step.rows_per_device * step.config.data.micro_batches, _tensor_size(step)
    forward, targets = forward_of(model, row), rows * int(np.sum(row.target_slot > 0))
    run = 2 * layer_products(model) * rows * row.token.size
    last = run * model.hidden_dim * model.dim * model.num_layers / layer_products(model)
    visited = rows * 4 * model.num_heads * model.head_width * _visited_pairs(step)
    # The backward of attention forms the scores once more: five products for the forward's two.
    layers = (passes.policy + passes.frozen) * (run + visited) + 0.5 * visited
    again = passes.recomputed * (run - last) + passes.attended * visited
    asked = passes.model * (forward.layers + forward.attention) + passes.head_model * forward.head
    return Work(
        model_flops=rows * asked / cut,
        flops=(layers + again + passes.head * rows * forward.head) / cut,
        memory_bytes=_weights(step, passes) + (_head(step, passes, targets) + _activations(step, passes)) / cut,
    )


def layer_products(model: ModelConfig) -> int:
    """Weights of all layers that a token is multiplied with."""
    attention = 2 * (model.num_heads + model.num_key_heads) * model.head_width
    return model.num_layers * model.dim * (attention + 3 * model.hidden_dim)


def _visited_pairs(step: AbstractStep) -> float:
    """Pairs of a query and a key in the blocks that a row's attention visits, over all layers."""
    return float(step.config.model.num_layers * step.config.data.block**2 * np.sum(step.row.block_pairs[:, 1] >= 0))


def _tensor_size(step: AbstractStep) -> int:
    return dict(step.mesh.shape).get("tensor", 1)


def _width(model: ModelConfig) -> int:
    """Bytes of a number that is computed with."""
    return 4 if model.dtype == "float32" else 2


def _weights(step: AbstractStep, passes: Passes) -> float:
    """Layers: written when gathered, read in every forward and once in the backward. The optimizer: its own piece."""
    model, gathered = step.config.model, dict(step.mesh.shape)["fsdp"] > 1
    dense = not step.config.lora.rank  # its backward is two products but reads weights once
    runs = passes.policy - dense + passes.recomputed + passes.frozen
    layers = step.config.data.micro_batches * runs * layer_products(model) * _width(model) * (1 + gathered)
    return layers / _tensor_size(step) + 2 * bytes_on_device(step.state)


def _head(step: AbstractStep, passes: Passes, targets: float) -> float:
    """The kernel is read for every product of every chunk, its float32 gradient read and written in the backward's."""
    model, micro_batches = step.config.model, step.config.data.micro_batches
    chunks = micro_batches * -(-targets // (step.config.objective.head_chunk * micro_batches))
    return chunks * model.dim * padded_vocabulary(model) * (_width(model) * passes.head + 8)


def _activations(step: AbstractStep, passes: Passes) -> float:
    """What layers read and write, in the type that is computed in."""
    model, runs = step.config.model, passes.policy + passes.recomputed + passes.frozen
    tokens = step.rows_per_device * step.config.data.micro_batches * step.row.token.size
    return _width(model) * runs * model.num_layers * tokens * layer_values(model)


def layer_values(model: ModelConfig) -> int:
    """Values that a layer's products and its two norms read and write for a token."""
    heads, key_heads = model.num_heads * model.head_width, model.num_key_heads * model.head_width
    return 8 * model.dim + 2 * heads + 2 * key_heads + 3 * model.hidden_dim


def kept_values(model: ModelConfig) -> int:
    """Values of a token that a layer keeps for its backward, at least."""
    kept = {"full": model.dim, "attention": model.dim + model.num_heads * model.head_width}
    return kept.get(model.remat, layer_values(model) // 2)  # of what is read and written, one side


def bytes_on_device(tree: object) -> int:
    """Bytes of a tree of placed shapes that lie in one device's own memory."""
    return sum(_bytes_of_piece(leaf) for leaf in jax.tree.leaves(tree) if not _on_host(leaf))


def bytes_on_host(tree: object) -> int:
    """Bytes of a tree of placed shapes that lie in the host's memory for one device."""
    return sum(_bytes_of_piece(leaf) for leaf in jax.tree.leaves(tree) if _on_host(leaf))


def _on_host(leaf: jax.ShapeDtypeStruct) -> bool:
    return leaf.sharding.memory_kind == HOST


def _bytes_of_piece(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def times_of(work: Work, collectives: Iterable[Collective], chip: Chip) -> Times:
    """The time of each kind of work at the chip's peaks; a ring along all links is taken for every collective."""
    collectives = list(collectives)
    return Times(
        compute=work.flops / chip.flops,
        memory=work.memory_bytes / chip.memory_bandwidth,
        links=sum(c.over_links for c in collectives) / chip.link,
        network=sum(c.over_network for c in collectives) / chip.network,
    )
