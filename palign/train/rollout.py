"""On-policy data: the responses of a step are the policy's own, drawn anew every few steps.

The rows are planned for responses of the greatest length, so the plan is known before training and a run that goes on
meets the same prompts. What is drawn is packed into those rows, shorter where EOS came. The draws of a step depend on
the parameters then, the seed and the step alone.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from palign.config.schema import RolloutConfig
from palign.data.loader import Dataset
from palign.data.plan import Plan
from palign.generate.sample import Samples, make_sampler
from palign.generate.texts import PROMPT_MULTIPLE
from palign.models.protocol import LanguageModel, Params
from palign.sharding.mesh import SHARED, num_row_shards, row_sharding
from palign.types import Batch

# (params, prompts, key) -> one response to each, and whether each has ended with EOS
Draw = Callable[[Params, Sequence[np.ndarray], jax.Array], tuple[list[np.ndarray], np.ndarray]]


def on_policy_batches(
    dataset: Dataset,
    draw: Draw,
    current: Callable[[], Params],
    *,
    every: int,
    start: int,
    micro_batches: int,
    seed: int,
    rows: slice = slice(None),
) -> Generator[tuple[int, Batch, dict[str, float]]]:
    """Yields (step, batch, figures of the draw), each batch with the policy's own responses.

    Args:
        dataset: prompts, each with room for a response (`prepare.reserve_room`).
        draw: see `make_draw`.
        current: gives the policy's parameters as they are when new samples are needed.
        every: steps between two draws.
        start: the first step, a multiple of `every`.
        micro_batches: see `Dataset.step_batch`.
        seed: of the draws.
        rows: see `Dataset.step_batch`.

    Yields:
        The steps from `start` on. The figures are TRL's: `completions/mean_length`, tokens, and
        `completions/clipped_ratio`, the share of responses that did not end.
    """
    for first in range(start, dataset.num_steps, every):
        parts = [part_of_step(dataset, step) for step in range(first, min(first + every, dataset.num_steps))]
        prompts = [tree.prompt for part in parts for tree in part.trees]
        responses, finished = draw(current(), prompts, jax.random.fold_in(jax.random.key(seed), first))
        figures = {
            "completions/mean_length": float(np.mean([response.size for response in responses])),
            "completions/clipped_ratio": float(1 - np.mean(finished)),
        }
        drawn = iter(responses)
        for step, part in enumerate(parts, start=first):
            trees = [tree._replace(responses=(next(drawn),)) for tree in part.trees]
            drawn_part = dataclasses.replace(part, trees=trees)
            yield step, drawn_part.step_batch(0, micro_batches=micro_batches, rows=rows), figures


def part_of_step(dataset: Dataset, step: int) -> Dataset:
    """One step of a data set as a data set of its own; an example that comes twice in it is there twice."""
    plan, rows = dataset.plan, dataset.plan.rows_per_step
    offsets = plan.offsets[step * rows : (step + 1) * rows + 1]
    trees = [dataset.trees[i] for i in plan.members[offsets[0] : offsets[-1]]]
    members = np.arange(len(trees), dtype=np.int32)
    epochs = plan.epoch_of_row[step * rows : (step + 1) * rows]
    return dataclasses.replace(dataset, trees=trees, plan=Plan(members, offsets - offsets[0], epochs, rows, 1))


def make_draw(
    lm: LanguageModel, mesh: Mesh, dataset: Dataset, settings: RolloutConfig, *, eos_ids: tuple[int, ...]
) -> Draw:
    """Makes the function that draws the responses of `settings.every` steps at once, compiled for one shape.

    Args:
        lm: the model.
        mesh: the devices; each draws its share of the responses.
        dataset: whose steps bound how many prompts come at a time, and how long they are.
        settings: how to sample.
        eos_ids: the tokens that end a response.
    """
    sampler = make_sampler(
        lm,
        samples=1,
        max_new_tokens=settings.max_new_tokens,
        eos_ids=eos_ids,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )
    # Every process gets all the samples: each packs the rows that its own devices hold.
    compiled = jax.jit(sampler, out_shardings=NamedSharding(mesh, SHARED))
    shape, places = _capacity(dataset, settings.every, num_row_shards(mesh)), row_sharding(mesh)

    def draw(params: Params, prompts: Sequence[np.ndarray], key: jax.Array) -> tuple[list[np.ndarray], np.ndarray]:
        arrays = [jax.make_array_from_callback(x.shape, places, x.__getitem__) for x in _pad(prompts, shape)]
        with jax.set_mesh(mesh):
            drawn: Samples = compiled(params, *arrays, key)
        token, length = np.asarray(drawn.token), np.asarray(drawn.length)
        responses = [token[i, 0, : length[i, 0]] for i in range(len(prompts))]
        return responses, np.asarray(drawn.finished)[: len(prompts), 0]

    return draw


def _capacity(dataset: Dataset, every: int, shards: int) -> tuple[int, int]:
    """Most prompts that a draw has, as many for each device, and the longest, rounded up."""
    rows = dataset.plan.rows_per_step * every
    ends = [*range(0, len(dataset.plan.offsets) - 1, rows), len(dataset.plan.offsets) - 1]
    most = int(np.diff(dataset.plan.offsets[ends]).max())
    longest = max(tree.prompt.size for tree in dataset.trees)
    return -(-most // shards) * shards, -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE


def _pad(prompts: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads prompts, and the batch with copies of the first one."""
    token, length = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)
    for row, prompt in enumerate([*prompts, *[prompts[0]] * (shape[0] - len(prompts))]):
        token[row, : prompt.size], length[row] = prompt, prompt.size
    return token, length
