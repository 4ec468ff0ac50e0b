"""The plan of a run: which examples share a row, and which rows make a step, for all epochs at once.

A plan needs lengths only. It is a pure function of (lengths, seed), so the data of any step can be rebuilt without the
steps before it. Packing is best fit over a window of the shuffled order: a row begins with the example that has waited
longest and takes the largest of the next `window` examples that still fits, until none does. The rows of an epoch are
then shuffled: taking the largest first would otherwise tie an example's length to the step at which it comes.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from palign.data.pack import PAIR_POLICIES, RowShape, named, subset_tree, tree_tokens
from palign.data.stored import TreeSize, tree_size, tree_sizes
from palign.data.tokenize import TokenTree

WINDOW = 1024

Fitted = tuple[Sequence[TokenTree], dict[str, int]]
# (epoch, source of chance) -> the epoch's examples, in the order in which they are packed
Order = Callable[[int, np.random.Generator], np.ndarray]


class RowNeeds(NamedTuple):
    """What each of n examples takes of a row.

    Attributes:
        tokens: [n] int64, under the layout.
        targets: [n] int64.
        pairs: [n] int64, under the pair policy.
    """

    tokens: np.ndarray
    targets: np.ndarray
    pairs: np.ndarray


class Plan(NamedTuple):
    """The rows of a run, in order. Step s takes rows [s * rows_per_step, (s + 1) * rows_per_step).

    Attributes:
        members: [total] int32, the examples (indices into the list that was planned) of all rows, one row after
            another.
        offsets: [num_rows + 1] int64, row r holds members[offsets[r]:offsets[r + 1]].
        epoch_of_row: [num_rows] int32.
        rows_per_step: R.
        num_steps: steps of the run; the last one is filled up with empty rows.
    """

    members: np.ndarray
    offsets: np.ndarray
    epoch_of_row: np.ndarray
    rows_per_step: int
    num_steps: int

    def row(self, index: int) -> np.ndarray:
        """Returns the examples of a row, none for a row beyond the last."""
        if index >= len(self.offsets) - 1:
            return self.members[:0]
        return self.members[self.offsets[index] : self.offsets[index + 1]]


def row_needs(trees: Sequence[TokenTree], *, layout: str, pair_policy: str) -> RowNeeds:
    """Returns what each tree takes of a row.

    Args:
        trees: n trees.
        layout: a name in `pack.LAYOUTS`.
        pair_policy: a name in `pack.PAIR_POLICIES`.

    Returns:
        The needs, [n] each.
    """
    policy, rng = named(PAIR_POLICIES, pair_policy, "pair policy"), np.random.default_rng(0)
    num_pairs = functools.lru_cache(lambda scores: len(policy(scores, rng)))  # most pairs have the same two scores
    needs = np.empty((3, len(trees)), np.int64)
    for i, size in enumerate(tree_sizes(trees)):
        needs[:, i] = _tokens(size, layout), sum(size.targets), num_pairs(size.scores)
    return RowNeeds(*needs)


def plan_epochs(
    needs: RowNeeds,
    shape: RowShape,
    *,
    rows_per_step: int,
    seed: int,
    epochs: int | None = None,
    max_steps: int | None = None,
    window: int = WINDOW,
    order: Order | None = None,
) -> Plan:
    """Plans packed training rows. Without an `order` every epoch holds each example once, in an order of its own.

    Args:
        needs: of n examples, each of which fits a row by itself (see `fit_trees`).
        shape: the rows' capacities; tokens, trees, targets and pairs are kept.
        rows_per_step: R.
        seed: of the orders.
        epochs: how often to go through the examples; None = until `max_steps`.
        max_steps: the most steps; None = as many as the epochs have. The epochs' rows follow one another, so a step
            may hold rows of two epochs.
        window: how many examples of the shuffled order to choose from.
        order: what an epoch holds and in which order, where an example may come several times or not at all, as in
            `Mixture.order`.

    Returns:
        The plan.

    Raises:
        ValueError: if neither epochs nor max_steps is given, one is below 1, or an example does not fit a row.
    """
    _check_run(len(needs.tokens), rows_per_step, epochs, max_steps, window)
    _check_needs(needs, shape)
    order = order or _each_once(len(needs.tokens))
    rows = (
        (epoch, row)
        for epoch in _epoch_numbers(epochs)
        for row in _epoch_rows(needs, shape, order, seed, epoch, window)
    )
    return _collect(rows, rows_per_step, max_steps)


def plan_padded(
    num_examples: int,
    *,
    examples_per_step: int,
    seed: int,
    epochs: int | None = None,
    max_steps: int | None = None,
    order: Order | None = None,
) -> Plan:
    """Plans rows of one tree each, a fixed number of examples a step: padded batches, as other trainers have them.

    Args:
        num_examples: n.
        examples_per_step: R.
        seed: of the orders.
        epochs: see `plan_epochs`.
        max_steps: see `plan_epochs`.
        order: see `plan_epochs`.

    Returns:
        The plan.

    Raises:
        ValueError: as `plan_epochs`.
    """
    _check_run(num_examples, examples_per_step, epochs, max_steps)
    order = order or _each_once(num_examples)
    rows = (
        (epoch, [int(i)])
        for epoch in _epoch_numbers(epochs)
        for i in order(epoch, np.random.default_rng((seed, epoch)))
    )
    return _collect(rows, examples_per_step, max_steps)


def plan_evaluation(needs: RowNeeds, shape: RowShape, *, rows_per_step: int, window: int = WINDOW) -> Plan:
    """Plans packed rows of each example once, in the data's order, for evaluation and for caches.

    Args:
        needs: of n examples.
        shape: the rows' capacities.
        rows_per_step: R.
        window: how many examples to choose from.

    Returns:
        The plan, one epoch.

    Raises:
        ValueError: if there are no examples or one does not fit a row.
    """
    _check_run(len(needs.tokens), rows_per_step, 1, None, window)
    _check_needs(needs, shape)
    rows = ((0, row) for row in _best_fit(np.arange(len(needs.tokens)), needs, shape, window))
    return _collect(rows, rows_per_step, None)


def fill_ratio(plan: Plan, needs: RowNeeds, shape: RowShape) -> float:
    """Returns the share of the plan's row tokens that are not padding, the empty rows of the last step left out."""
    return float(needs.tokens[plan.members].sum() / (len(plan.epoch_of_row) * shape.tokens))


def reject_oversize(trees: Sequence[TokenTree], shape: RowShape, layout: str, seed: int) -> Fitted:
    """Returns the trees if every one fits a row.

    Args:
        trees: the trees.
        shape: the rows' capacities.
        layout: a name in `pack.LAYOUTS`.
        seed: not used.

    Returns:
        The same trees, and no counts.

    Raises:
        ValueError: otherwise, with the row length and the number of responses that would be needed.
    """
    _require_fit(trees, shape, layout, "use the oversize policy 'subset'")
    return trees, {}


def subset_oversize(trees: Sequence[TokenTree], shape: RowShape, layout: str, seed: int) -> Fitted:
    """Takes responses out of trees that do not fit a row: best and worst stay, with a sample of as many others as fit.

    Args:
        trees: the trees.
        shape: the rows' capacities.
        layout: a name in `pack.LAYOUTS`.
        seed: of the samples.

    Returns:
        The trees, and the counts `oversize_trees` and `oversize_responses_removed`.

    Raises:
        ValueError: if the best and the worst alone (or a single response) do not fit.
    """
    sizes = tree_sizes(trees)
    misfits = [i for i, size in enumerate(sizes) if len(size.scores) > 2 and not _fits(size, shape, layout)]
    smaller = {i: _largest_subset(trees[i], shape, layout, seed) for i in misfits}
    removed = sum(len(sizes[i].responses) - len(tree.responses) for i, tree in smaller.items())
    fitted = [smaller.get(i, tree) for i, tree in enumerate(trees)] if smaller else trees
    _require_fit(fitted, shape, layout, "remove those records: even best and worst alone are too long")
    return fitted, {"oversize_trees": len(smaller), "oversize_responses_removed": removed}


# Name -> what is done with trees that do not fit a row.
OVERSIZE: dict[str, Callable[[Sequence[TokenTree], RowShape, str, int], Fitted]] = {
    "error": reject_oversize,
    "subset": subset_oversize,
}


def fit_trees(
    trees: Sequence[TokenTree], shape: RowShape, *, layout: str, oversize: str = "error", seed: int = 0
) -> Fitted:
    """Makes every tree fit a row under a policy; call it before planning.

    Args:
        trees: the trees.
        shape: the rows' capacities.
        layout: a name in `pack.LAYOUTS`.
        oversize: a name in `OVERSIZE`.
        seed: of samples.

    Returns:
        The trees in their order, and what was changed, counted.

    Raises:
        ValueError: as the policy says.
    """
    return named(OVERSIZE, oversize, "oversize policy")(trees, shape, layout, seed)


def _each_once(num_examples: int) -> Order:
    return lambda epoch, rng: rng.permutation(num_examples)


def _epoch_rows(needs: RowNeeds, shape: RowShape, order: Order, seed: int, epoch: int, window: int) -> list[list[int]]:
    """Returns an epoch's rows, packed along one shuffled order and put into another."""
    rng = np.random.default_rng((seed, epoch))
    rows = list(_best_fit(order(epoch, rng), needs, shape, window))
    return [rows[i] for i in rng.permutation(len(rows))]


def _best_fit(order: np.ndarray, needs: RowNeeds, shape: RowShape, window: int) -> Iterator[list[int]]:
    """Yields rows: the example first in line, then the largest of the window that fit, ties to the first in line."""
    tokens, targets, pairs = (column[order].tolist() for column in needs)
    waiting: list[tuple[int, int]] = []  # (tokens, -place in line), sorted: the last that fits is the one to take
    taken, end = bytearray(len(order)), 0
    for head in range(len(order)):
        if taken[head]:
            continue
        while end < len(order) and len(waiting) < window:
            bisect.insort(waiting, (tokens[end], -end))
            end += 1
        row, choice = [], bisect.bisect_left(waiting, (tokens[head], -head))
        room = [shape.tokens, shape.targets, shape.pairs]
        while choice >= 0:
            place = -waiting.pop(choice)[1]
            row.append(place)
            taken[place] = True
            room = [room[0] - tokens[place], room[1] - targets[place], room[2] - pairs[place]]
            choice = bisect.bisect_right(waiting, (room[0], 1)) - 1 if len(row) < shape.trees else -1
            while choice >= 0 and (targets[-waiting[choice][1]] > room[1] or pairs[-waiting[choice][1]] > room[2]):
                choice -= 1
        yield order[row].tolist()


def _collect(rows: Iterator[tuple[int, list[int]]], rows_per_step: int, max_steps: int | None) -> Plan:
    """Returns the plan of the rows, as many as `max_steps` take."""
    taken = list(itertools.islice(rows, None if max_steps is None else max_steps * rows_per_step))
    offsets = np.cumsum([0, *(len(row) for _, row in taken)], dtype=np.int64)
    members = np.fromiter(itertools.chain.from_iterable(row for _, row in taken), np.int32, int(offsets[-1]))
    epoch_of_row = np.asarray([epoch for epoch, _ in taken], np.int32)
    return Plan(members, offsets, epoch_of_row, rows_per_step, -(-len(taken) // rows_per_step))


def _epoch_numbers(epochs: int | None) -> Iterator[int]:
    return iter(itertools.count() if epochs is None else range(epochs))


def _check_run(
    num_examples: int, rows_per_step: int, epochs: int | None, max_steps: int | None, window: int = 1
) -> None:
    if num_examples < 1:
        raise ValueError("there are no examples to plan; see the counts of what was dropped")
    if epochs is None and max_steps is None:
        raise ValueError("the plan has no end: give epochs, max_steps or both")
    settings = {"rows_per_step": rows_per_step, "epochs": epochs, "max_steps": max_steps, "window": window}
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")


def _check_needs(needs: RowNeeds, shape: RowShape) -> None:
    for name in ("tokens", "targets", "pairs"):
        most, capacity = int(getattr(needs, name).max()), getattr(shape, name)
        if most > capacity:
            raise ValueError(
                f"an example needs {most} {name} but a row holds {capacity}; make RowShape.{name} that large or pass "
                "the trees through fit_trees with the oversize policy 'subset'"
            )


def _tokens(size: TreeSize, layout: str) -> int:
    return tree_tokens(size.prompt, size.responses, layout)


def _require_fit(trees: Sequence[TokenTree], shape: RowShape, layout: str, advice: str) -> None:
    misfits = {i: size for i, size in enumerate(tree_sizes(trees)) if not _fits(size, shape, layout)}
    if misfits:
        tokens = -(-max(_tokens(size, layout) for size in misfits.values()) // shape.block) * shape.block
        responses = max(len(size.responses) for size in misfits.values())
        raise ValueError(
            f"{len(misfits)} of {len(trees)} trees do not fit a row of {shape.tokens} tokens, {shape.targets} targets "
            f"and {shape.responses} responses (example {trees[min(misfits)].id} is the first); the largest needs a row "
            f"of {tokens} tokens and there are up to {responses} responses: make rows that large, lower max_length, "
            f"or {advice}"
        )


def _fits(size: TreeSize, shape: RowShape, layout: str) -> bool:
    few = len(size.responses) <= shape.responses
    short = sum(size.targets) <= shape.targets
    return few and short and _tokens(size, layout) <= shape.tokens


def _largest_subset(tree: TokenTree, shape: RowShape, layout: str, seed: int) -> TokenTree:
    """Returns the tree with as many responses as fit, two at least where it has two."""
    keep, smaller = len(tree.scores), tree
    while keep > 2 and not _fits(tree_size(smaller), shape, layout):
        keep -= 1
        smaller = subset_tree(tree, keep, seed)
    return smaller
