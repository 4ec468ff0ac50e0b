"""The lists of (query block, key block) pairs that attention visits, made on the host with numpy.

A row of `T` tokens is cut into `T / block` blocks. Query q sees key k iff their groups are equal and positive, the key
is in the prompt or in the query's own branch, and the key's position is not after the query's. A pair of blocks is
listed when the rule lets at least one of its queries see at least one of its keys. What a listed pair must not show is
masked inside it, a layer's window included, so a list that is too long costs time and a list that is too short is
wrong.
"""

import numpy as np


def causal_pair_capacity(tokens: int, block: int) -> int:
    """Returns how many block pairs a row laid out in order can need: the causal triangle, n(n+1)/2.

    Args:
        tokens: T, length of the row.
        block: tokens in a block; divides `tokens`.

    Returns:
        n(n+1)/2 for n = tokens / block.

    Raises:
        ValueError: if the block does not divide the row.
    """
    blocks = _num_blocks(tokens, block)
    return blocks * (blocks + 1) // 2


def list_block_pairs(
    group: np.ndarray, branch: np.ndarray, position: np.ndarray, block: int, capacity: int | None = None
) -> np.ndarray:
    """Lists every pair of blocks in which some query sees some key, windows ignored.

    Works on the pieces of equal (group, branch) inside each block with their least and greatest position, which decides
    exactly and for any order of the row's tokens whether a query of one piece sees a key of another.

    Args:
        group: [T] int, the prompt copy of each token, 0 = padding.
        branch: [T] int, 0 = prompt, k = response k.
        position: [T] int, position of each token in its branch.
        block: tokens in a block; divides T.
        capacity: length N of the list. Default: the causal triangle, enough for every row whose tokens lie in order; a
            reordered row may need up to n * n.

    Returns:
        [N, 2] int32 (query block, key block), sorted by query block, then key block. It holds every diagonal pair,
        also of blocks that are all padding, and is filled up with (last query block, -1).

    Raises:
        ValueError: if shapes differ, the block does not divide T, or the list is longer than the capacity.
    """
    group, branch, position = (np.asarray(x) for x in (group, branch, position))
    if not (group.ndim == 1 and group.shape == branch.shape == position.shape):
        raise ValueError(
            f"list_block_pairs got group {group.shape}, branch {branch.shape}, position {position.shape}; "
            "expected three arrays of one shape [T]"
        )
    blocks = _num_blocks(group.size, block)
    piece_block, piece_group, piece_branch, first, last = _pieces(group, branch, position, block)
    sees = piece_group[:, None] == piece_group[None, :]
    sees &= (piece_branch[None, :] == 0) | (piece_branch[None, :] == piece_branch[:, None])
    sees &= last[:, None] >= first[None, :]
    query, key = np.nonzero(sees)
    touched = np.eye(blocks, dtype=bool)
    touched[piece_block[query], piece_block[key]] = True
    pairs = np.argwhere(touched)
    capacity = causal_pair_capacity(group.size, block) if capacity is None else capacity
    if len(pairs) > capacity:
        raise ValueError(
            f"this row touches {len(pairs)} block pairs but the list's capacity is {capacity}; a row whose tokens "
            f"are not in order may need up to {blocks * blocks}: pass a larger capacity"
        )
    padding = np.tile([blocks - 1, -1], (capacity - len(pairs), 1))
    return np.concatenate([pairs, padding]).astype(np.int32)


def deal_blocks(block_pairs: np.ndarray, blocks: int, pieces: int) -> np.ndarray:
    """Deals the blocks of a row to devices so that attention costs each about the same.

    A query block costs as many block pairs as it is in. The dearest is dealt first, each to the piece that has the
    least and still has room.

    Args:
        block_pairs: [N, 2] of the row, as `list_block_pairs` makes it.
        blocks: n, of the row.
        pieces: C, divides n.

    Returns:
        [n] int, the row's blocks in their new order: piece after piece, n / C each, inside a piece as before.
    """
    cost = np.bincount(block_pairs[block_pairs[:, 1] >= 0, 0], minlength=blocks)
    load = np.zeros(pieces)
    dealt: list[list[int]] = [[] for _ in range(pieces)]
    for block in np.argsort(-cost, kind="stable"):
        piece = int(np.argmin(load))
        dealt[piece].append(block)
        load[piece] = load[piece] + cost[block] if len(dealt[piece]) < blocks // pieces else np.inf
    return np.sort(dealt, axis=1).reshape(-1)


def tree_mask(group: np.ndarray, branch: np.ndarray, position: np.ndarray, window: int | None = None) -> np.ndarray:
    """Returns the dense rule, which tests hold everything else against.

    Args:
        group: [T] int, 0 = padding.
        branch: [T] int, 0 = prompt.
        position: [T] int.
        window: how many positions back a query sees, itself included; None = all.

    Returns:
        [T, T] bool, entry (q, k) is True where query q sees key k.
    """
    group, branch, position = (np.asarray(x) for x in (group, branch, position))
    distance = position[:, None] - position[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same_tree = (group[:, None] == group[None, :]) & (group[:, None] > 0)
    on_path = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    return same_tree & on_path & near


def _num_blocks(tokens: int, block: int) -> int:
    if block < 1 or tokens < block or tokens % block:
        raise ValueError(f"a row of {tokens} tokens cannot be cut into blocks of {block}; use a multiple of the block")
    return tokens // block


def _pieces(group: np.ndarray, branch: np.ndarray, position: np.ndarray, block: int) -> tuple[np.ndarray, ...]:
    """Returns (block, group, branch, least position, greatest position) of each piece, padding left out."""
    real = np.flatnonzero(group > 0)
    columns = (branch[real], group[real], real // block)
    order = np.lexsort(columns)
    branch_, group_, block_ = (column[order] for column in columns)
    position_ = position[real][order]
    new = np.ones(real.size, dtype=bool)
    new[1:] = (np.diff(block_) != 0) | (np.diff(group_) != 0) | (np.diff(branch_) != 0)
    start = np.flatnonzero(new)
    if not start.size:
        return block_, group_, branch_, position_, position_
    least, greatest = np.minimum.reduceat(position_, start), np.maximum.reduceat(position_, start)
    return block_[start], group_[start], branch_[start], least, greatest
