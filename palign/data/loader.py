"""The data of a run as a pure function of the step, and an iterator over it that reads ahead."""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from palign.data.pack import RowShape, join_targets, pack_row, stack_rows
from palign.data.pieces import in_pieces
from palign.data.plan import Plan, plan_evaluation, row_needs
from palign.data.stored import trees_digest
from palign.data.tokenize import TokenTree
from palign.types import Batch


@dataclass(frozen=True)
class Dataset:
    """Tokenised examples with the plan of their rows.

    Attributes:
        trees: the examples that the plan's members number.
        shape: capacities of a row.
        plan: which examples make which row and step.
        pair_policy: a name in `pack.PAIR_POLICIES`.
        layout: a name in `pack.LAYOUTS`.
        seed: of the pairs that a policy draws.
        reference_logps: for each tree and response one cached log-probability (nats) a target, or None.
        weights: each tree's importance, or None.
        hidden: role of a frozen model -> for each tree and response its hidden states at the targets, `[targets, D]`,
            or None.
        pieces: into how many pieces devices cut a row; what a row means does not depend on it.
    """

    trees: Sequence[TokenTree]
    shape: RowShape
    plan: Plan
    pair_policy: str
    layout: str
    seed: int
    reference_logps: Sequence[Sequence[np.ndarray]] | None = None
    weights: Sequence[float] | None = None
    hidden: Mapping[str, Sequence[Sequence[np.ndarray]]] | None = None
    pieces: int = 1

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.plan.num_steps

    def once(self) -> "Dataset":
        """Returns the same data planned unshuffled, each example once: for evaluation and for caches."""
        needs = row_needs(self.trees, layout=self.layout, pair_policy=self.pair_policy)
        return replace(self, plan=plan_evaluation(needs, self.shape, rows_per_step=self.plan.rows_per_step))

    def row(self, index: int) -> Batch:
        """Returns row `index` of the plan, without the axis R; an empty row beyond the last."""
        members = self.plan.row(index)
        weights = None if self.weights is None else [self.weights[i] for i in members]
        trees = [self.trees[i] for i in members]
        row = pack_row(trees, self.shape, self.pair_policy, self.layout, seed=self.seed, weights=weights)

        def joined(cached: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
            return join_targets(row, [cached[i] for i in members], like=cached[0][0])

        row = row._replace(
            reference_logps=None if self.reference_logps is None else joined(self.reference_logps),
            hidden=None if self.hidden is None else {role: joined(cached) for role, cached in self.hidden.items()},
        )
        return in_pieces(row, self.shape.block, self.pieces)

    def step_batch(self, step: int, *, micro_batches: int, rows: slice = slice(None)) -> Batch:
        """Returns the batch of a step, a pure function of the step.

        Row r of micro-batch a is the plan's row `step * R + a * R/A + r`.

        Args:
            step: 0..num_steps - 1.
            micro_batches: A, divides the plan's R.
            rows: which of the R/A rows of each micro-batch to build: those that this process's devices hold.

        Returns:
            Numpy leaves [A, R/A or the length of `rows`, ...].

        Raises:
            ValueError: for a step outside the plan, an A that does not divide R, or a slice without rows.
        """
        per_step = self.plan.rows_per_step
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is outside the plan's steps 0..{self.num_steps - 1}")
        if micro_batches < 1 or per_step % micro_batches:
            raise ValueError(f"{micro_batches} micro-batches do not divide a step's {per_step} rows; choose a divisor")
        columns = range(per_step // micro_batches)[rows]
        if not columns:
            raise ValueError(f"{rows} takes none of the {per_step // micro_batches} rows of a micro-batch")
        first = [step * per_step + a * (per_step // micro_batches) for a in range(micro_batches)]
        return stack_rows([stack_rows([self.row(start + column) for column in columns]) for start in first])


def batches(
    dataset: Dataset, *, start_step: int, micro_batches: int, rows: slice = slice(None), read_ahead: int = 2
) -> Generator[tuple[int, Batch]]:
    """Yields (step, batch) from a step on, built ahead of time by Grain's threads.

    Grain maps step numbers to batches; order, epochs and sharding are the plan's and `rows`' business.

    Args:
        dataset: the data.
        start_step: the first step to yield.
        micro_batches: see `Dataset.step_batch`.
        rows: see `Dataset.step_batch`.
        read_ahead: batches kept ready, one thread each up to two; 0 builds each when it is asked for.

    Yields:
        The steps start_step..num_steps - 1 with their batches. Closing the generator stops the threads.

    Raises:
        ValueError: for a start outside 0..num_steps, a negative read_ahead, and as `step_batch`.
    """
    if not 0 <= start_step <= dataset.num_steps or read_ahead < 0:
        raise ValueError(
            f"batches got start_step={start_step}, read_ahead={read_ahead}; expected a step from 0 to "
            f"{dataset.num_steps} and read_ahead of at least 0"
        )
    if start_step == dataset.num_steps:
        return

    import grain  # here, since making single batches needs none of it

    def build(step: int) -> tuple[int, Batch]:
        return int(step), dataset.step_batch(int(step), micro_batches=micro_batches, rows=rows)

    options = grain.ReadOptions(num_threads=min(read_ahead, 2), prefetch_buffer_size=read_ahead)
    steps = iter(grain.MapDataset.range(start_step, dataset.num_steps).map(build).to_iter_dataset(options))
    try:
        yield from steps
    finally:
        steps.close()


def fingerprint(dataset: Dataset) -> str:
    """Returns a SHA-256 in hex of everything that decides what a step's batch holds, for checks on resume.

    It covers tokens, scores, ids, shape, plan, policies and seed, not the cached reference, which is checked by its
    own key.

    Args:
        dataset: the data.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256()
    settings = (tuple(dataset.shape), dataset.plan[3:], dataset.pair_policy, dataset.layout, dataset.seed)
    digest.update(repr(settings).encode())
    for array in (dataset.plan.members, dataset.plan.offsets, dataset.plan.epoch_of_row):
        digest.update(array.tobytes())
    digest.update(trees_digest(dataset.trees).encode())
    return digest.hexdigest()
