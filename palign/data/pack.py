"""Packs token trees into rows: one pass that places segments and lists targets, pairs and block pairs.

A row of two trees, prompt A = (p q r) with responses (a b) and (c), prompt B = (s t) with response (d e), under
`packed`:

    column         0  1  2   3  4   5   6  7   8  9   10 11
    token          p  q  r   a  b   c   s  t   d  e   0  0
    group          1  1  1   1  1   1   2  2   2  2   0  0
    branch         0  0  0   1  1   2   0  0   1  1   0  0
    position       0  1  2   3  4   3   0  1   2  3   0  0

    target_token   a  b  c  d  e        the tokens that the model is asked for
    target_source  2  3  2  7  8        the columns that predict them: both branches start from r, in column 2
    target_slot    1  1  2  3  3        with K = 2 slots an example: 1 and 2 belong to A, 3 and 4 to B, 0 is padding

Under `unshared` the prompt is written again before every response, in a group of its own; targets, slots and pairs do
not change.
"""

import difflib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from palign.attention.block_pairs import causal_pair_capacity, list_block_pairs
from palign.data.tokenize import TokenTree
from palign.types import Batch

Pairs = list[tuple[int, int]]


class RowShape(NamedTuple):
    """The capacities of a row, which no plan changes.

    Attributes:
        tokens: T, a multiple of `block`.
        trees: G, most examples in a row.
        responses: K, most responses of an example.
        targets: M, most targets in a row.
        pairs: P, most response pairs in a row.
        block: tokens in a block of attention.
        block_pairs: N, most block pairs in a row.
    """

    tokens: int
    trees: int
    responses: int
    targets: int
    pairs: int
    block: int
    block_pairs: int


class Segment(NamedTuple):
    """A run of tokens of one tree in a row.

    Attributes:
        copy: which copy of the prompt it belongs to, from 0.
        response: 0 for the prompt itself, k for response k.
    """

    copy: int
    response: int


def _best_worst(scores: Sequence[float], rng: np.random.Generator) -> Pairs:
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return [(best, worst)] if scores[best] > scores[worst] else []


def _all(scores: Sequence[float], rng: np.random.Generator) -> Pairs:
    indices = range(len(scores))
    return [(i, j) for i in indices for j in indices if scores[i] > scores[j]]


def _adjacent(scores: Sequence[float], rng: np.random.Generator) -> Pairs:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [(i, j) for i, j in itertools.pairwise(order) if scores[i] > scores[j]]


def _random(scores: Sequence[float], rng: np.random.Generator) -> Pairs:
    pairs = _all(scores, rng)
    return [pairs[rng.integers(len(pairs))]] if pairs else []


# Name -> (scores, rng) -> pairs (better, worse) of 0-based responses. Equal scores give no pair. How many pairs there
# are depends on the scores alone, never on the rng.
PAIR_POLICIES: dict[str, Callable[[Sequence[float], np.random.Generator], Pairs]] = {
    "best_worst": _best_worst,  # the first of the best against the first of the worst
    "all": _all,
    "adjacent": _adjacent,  # neighbours in the order of the scores
    "random": _random,  # one of all, drawn anew for each example
}


def _packed(responses: int) -> list[Segment]:
    return [Segment(0, k) for k in range(responses + 1)]


def _unshared(responses: int) -> list[Segment]:
    return [Segment(k - 1, part) for k in range(1, responses + 1) for part in (0, k)]


# Name -> number of responses -> the tree's segments in the order in which they are placed.
LAYOUTS: dict[str, Callable[[int], list[Segment]]] = {
    "packed": _packed,  # the prompt once, then every response
    "unshared": _unshared,  # the prompt again before every response
}


def row_shape(
    tokens: int, *, trees: int = 64, responses: int, pair_policy: str = "best_worst", block: int = 64
) -> RowShape:
    """Returns the capacities of rows of so many tokens; they are bounds, so generous ones cost bytes and no time.

    Args:
        tokens: T, a multiple of `block`.
        trees: G, most examples in a row.
        responses: K, most responses of an example.
        pair_policy: a name in `PAIR_POLICIES`.
        block: tokens in a block of attention: 64 on CPU, at least 128 on TPU.

    Returns:
        The shape, with M = T targets, the pairs that `trees` lists of K different scores give (at least 1), and the
        causal triangle of block pairs.

    Raises:
        ValueError: for a capacity below 1, a block that does not divide the row, or an unknown policy.
    """
    for name, value in (("tokens", tokens), ("trees", trees), ("responses", responses), ("block", block)):
        if value < 1:
            raise ValueError(f"row_shape got {name}={value}; expected at least 1")
    policy = named(PAIR_POLICIES, pair_policy, "pair policy")
    pairs = trees * len(policy(range(responses), np.random.default_rng(0)))
    return RowShape(tokens, trees, responses, tokens, max(pairs, 1), block, causal_pair_capacity(tokens, block))


def tree_tokens(prompt_length: int, response_lengths: Sequence[int], layout: str) -> int:
    """Returns how many tokens of a row a tree takes under a layout (a name in `LAYOUTS`)."""
    segments = named(LAYOUTS, layout, "layout")(len(response_lengths))
    return sum(prompt_length if s.response == 0 else response_lengths[s.response - 1] for s in segments)


def list_pairs(tree: TokenTree, pair_policy: str, *, seed: int) -> Pairs:
    """Lists the pairs of an example's responses, a pure function of (tree, policy, seed).

    Args:
        tree: the example.
        pair_policy: a name in `PAIR_POLICIES`.
        seed: with the example's id, of whatever the policy draws.

    Returns:
        (better, worse) 0-based responses; empty if all scores are equal.
    """
    return named(PAIR_POLICIES, pair_policy, "pair policy")(tree.scores, np.random.default_rng((seed, tree.id)))


def pack_row(
    trees: Sequence[TokenTree],
    shape: RowShape,
    pair_policy: str,
    layout: str,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
) -> Batch:
    """Packs trees into one row, in the order given. The module's docstring shows one.

    Args:
        trees: up to G trees that fit together.
        shape: the row's capacities.
        pair_policy: a name in `PAIR_POLICIES`.
        layout: a name in `LAYOUTS`.
        seed: of the pairs that a policy draws.
        weights: each tree's importance, or None.

    Returns:
        A `Batch` of numpy arrays without the leading axis R. Targets are in the row's order, padding last.

    Raises:
        ValueError: if something exceeds its capacity, naming it, or a tree breaks the rules of `TokenTree`.
    """
    row = _Row(shape, weights is not None)
    for e, tree in enumerate(trees):
        _check_tree(tree, shape)
        if e == shape.trees:
            raise ValueError(f"{len(trees)} trees do not fit a row of {shape.trees} (RowShape.trees)")
        weight = 1.0 if weights is None else weights[e]
        row.add_example(e, tree, list_pairs(tree, pair_policy, seed=seed), weight)
        row.add_segments(e, tree, named(LAYOUTS, layout, "layout")(len(tree.responses)))
    return row.finish()


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Stacks rows (or batches) of one shape along a new first axis.

    Args:
        rows: at least one row; what may be None (`reference_logps`, say) is given in all or in none.

    Returns:
        The batch.
    """
    return Batch(*(_stack(leaves) for leaves in zip(*rows, strict=True)))


def _stack(leaves: Sequence[Any]) -> Any:
    if isinstance(leaves[0], dict):
        return {name: _stack([leaf[name] for leaf in leaves]) for name in leaves[0]}
    return None if leaves[0] is None else np.stack(leaves)


def join_targets(row: Batch, values: Sequence[Sequence[np.ndarray]], like: np.ndarray) -> np.ndarray:
    """Puts values of examples where a row has their targets: the inverse of `split_targets`.

    Args:
        row: one row, without the axis R.
        values: for each of the row's examples, in order, one array `[tokens, ...]` for each of its responses.
        like: one such array, for rows without examples.

    Returns:
        [M, ...], zeros where the row lists no target.
    """
    K = row.valid.shape[1]
    joined = np.zeros((row.target_slot.size, *like.shape[1:]), like.dtype)
    for e, responses in enumerate(values):
        for k, response in enumerate(responses):
            joined[row.target_slot == 1 + e * K + k] = response
    return joined


def split_targets(row: Batch, values: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Hands a row's per-target values back to its examples.

    Args:
        row: one row, without the axis R.
        values: [M, ...] one value for each target.

    Returns:
        For each of the row's examples, in order, one array for each of its responses.
    """
    values = np.asarray(values)
    G, K = row.valid.shape
    return [
        tuple(values[row.target_slot == 1 + e * K + k] for k in range(K) if row.response_end[e, k] >= 0)
        for e in range(G)
        if row.valid[e].any()
    ]


class _Row:
    """The arrays of a row while it is filled."""

    def __init__(self, shape: RowShape, with_weights: bool):
        T, M, G, K = shape.tokens, shape.targets, shape.trees, shape.responses
        self.shape = shape
        self.tree_arrays = np.zeros((4, T), np.int32)
        self.token, self.position, self.group, self.branch = self.tree_arrays
        self.targets = np.zeros((3, M), np.int32)
        self.valid = np.zeros((G, K), bool)
        self.scores = np.zeros((G, K), np.float32)
        self.pairs = np.zeros((shape.pairs, 2), np.int32)
        self.response_end = np.full((G, K), -1, np.int32)
        self.example_id = np.full((G,), -1, np.int32)
        self.weight = np.ones((G,), np.float32) if with_weights else None
        self.used_tokens = self.used_targets = self.used_pairs = self.used_groups = 0

    def add_example(self, e: int, tree: TokenTree, pairs: Pairs, weight: float) -> None:
        K = self.shape.responses
        self.valid[e, : len(tree.scores)] = True
        self.scores[e, : len(tree.scores)] = tree.scores
        self.example_id[e] = tree.id
        if self.weight is not None:
            self.weight[e] = weight
        end = self.used_pairs + len(pairs)
        _check_room("pairs", end, self.shape.pairs)
        if pairs:
            self.pairs[self.used_pairs : end] = 1 + e * K + np.asarray(pairs)
        self.used_pairs = end

    def add_segments(self, e: int, tree: TokenTree, segments: list[Segment]) -> None:
        prompt_length, prompt_end, masks = tree.prompt.size, -1, tree.masks
        for copy, k in segments:
            tokens = tree.prompt if k == 0 else tree.responses[k - 1]
            start, end = self.used_tokens, self.used_tokens + tokens.size
            _check_room("tokens", end, self.shape.tokens)
            first = 0 if k == 0 else prompt_length
            self.token[start:end] = tokens
            self.position[start:end] = np.arange(first, first + tokens.size)
            self.group[start:end] = self.used_groups + copy + 1
            self.branch[start:end] = k
            self.used_tokens = end
            if k == 0:
                prompt_end = end - 1
                continue
            self.response_end[e, k - 1] = end - 1
            self._add_targets(1 + e * self.shape.responses + k - 1, tokens, masks[k - 1], prompt_end, start)
        self.used_groups += 1 + max(segment.copy for segment in segments)

    def _add_targets(self, slot: int, tokens: np.ndarray, learned: np.ndarray, prompt_end: int, start: int) -> None:
        begin, end = self.used_targets, self.used_targets + int(learned.sum())
        _check_room("targets", end, self.shape.targets)
        source, token, slots = self.targets
        source[begin:end] = np.append(prompt_end, np.arange(start, start + tokens.size - 1))[learned]
        token[begin:end] = tokens[learned]
        slots[begin:end] = slot
        self.used_targets = end

    def finish(self) -> Batch:
        slots = 1 + self.shape.trees * self.shape.responses
        assert 0 <= self.targets[2].min() and self.targets[2].max() < slots
        assert 0 <= self.pairs.min() and self.pairs.max() < slots
        assert 0 <= self.targets[0].min() and self.targets[0].max() < self.shape.tokens
        pairs = list_block_pairs(self.group, self.branch, self.position, self.shape.block, self.shape.block_pairs)
        source, token, slot = self.targets
        return Batch(
            token=self.token,
            position=self.position,
            group=self.group,
            branch=self.branch,
            target_source=source,
            target_token=token,
            target_slot=slot,
            block_pairs=pairs,
            valid=self.valid,
            scores=self.scores,
            pairs=self.pairs,
            response_end=self.response_end,
            example_id=self.example_id,
            weight=self.weight,
        )


def subset_tree(tree: TokenTree, keep: int, seed: int) -> TokenTree:
    """Returns the tree with `keep` of its responses: best, worst and a sample, in their old order.

    Subsets of one seed are nested: what `keep` leaves in, `keep + 1` leaves in too.

    Args:
        tree: the tree.
        keep: how many responses stay, at least 1; the best comes first, then the worst.
        seed: with the example's id, of the sample.

    Returns:
        The smaller tree, or the tree itself where it has no more than `keep` responses.
    """
    K, others = len(tree.scores), tree.responses[len(tree.scores) :]  # another prompt's response is never left out
    if keep < 1:
        raise ValueError(f"subset_tree got keep={keep}; expected at least 1")
    if keep >= K:
        return tree
    best, worst = int(np.argmax(tree.scores)), int(np.argmin(tree.scores))
    sample = [int(k) for k in np.random.default_rng((seed, tree.id)).permutation(K)]
    kept = sorted(list(dict.fromkeys([best, worst, *sample]))[:keep])
    learned = tree.learned and tuple(tree.learned[k] for k in kept) + tree.learned[K:]
    responses = tuple(tree.responses[k] for k in kept) + others
    return tree._replace(responses=responses, scores=tuple(tree.scores[k] for k in kept), learned=learned)


def _check_tree(tree: TokenTree, shape: RowShape) -> None:
    K = len(tree.responses)
    if not 1 <= K <= shape.responses:
        raise ValueError(
            f"example {tree.id} has {K} responses; expected 1 to {shape.responses}: raise RowShape.responses "
            "or use the oversize policy 'subset'"
        )
    if (
        len(tree.scores) + tree.mismatched != K
        or not tree.scores
        or not tree.prompt.size
        or not all(response.size for response in tree.responses)
    ):
        raise ValueError(
            f"example {tree.id} has {tree.prompt.size} prompt tokens, responses of {[r.size for r in tree.responses]} "
            f"tokens and {len(tree.scores)} scores; expected at least one token in each and one score a response"
        )
    sizes = [response.size for response in tree.responses]
    if tree.learned is not None and ([mask.size for mask in tree.learned] != sizes or not all(tree.num_targets)):
        raise ValueError(
            f"example {tree.id} learns {tree.num_targets} tokens of responses of {sizes} tokens; expected at least one "
            "of each, told by a mask of the response's length"
        )
    if tree.id < 0:
        raise ValueError(f"example id {tree.id} is negative; expected 0 or more, since -1 marks an empty slot")


def _check_room(what: str, needed: int, capacity: int) -> None:
    if needed > capacity:
        raise ValueError(f"the trees need {needed} {what} but a row holds {capacity} (RowShape.{what})")


def named(table: dict[str, Callable], name: str, what: str) -> Callable:
    """Returns a table's entry.

    Args:
        table: names and functions.
        name: the name to look up.
        what: what the table holds, for the message.

    Returns:
        The function.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if name not in table:
        near = difflib.get_close_matches(str(name), table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} is {name!r}; expected one of {', '.join(table)}{hint}")
    return table[name]
