"""Rows laid out for several devices each: blocks exchanged whole, so that each piece costs about the same."""

import numpy as np

from palign.attention.block_pairs import deal_blocks
from palign.types import Batch


def in_pieces(row: Batch, block: int, pieces: int) -> Batch:
    """Puts a row's blocks into an order in which equal pieces of it cost attention about the same.

    Who sees whom follows from positions, groups and branches, which move with their tokens, so the row means what it
    meant and lists as many pairs of blocks. The table of targets keeps its order; the columns that it names follow.

    Args:
        row: one row, without the axis R.
        block: tokens in a block of attention.
        pieces: into how many the row will be cut; its blocks can be shared evenly.

    Returns:
        The row in its new order; itself where it stays in one piece.
    """
    if pieces == 1:
        return row
    blocks = row.token.size // block
    order = deal_blocks(row.block_pairs, blocks, pieces)
    tokens = (order[:, None] * block + np.arange(block)).reshape(-1)
    place = np.argsort(order).astype(np.int32)  # where a block is now

    def follow(columns: np.ndarray) -> np.ndarray:
        return place[columns // block] * block + columns % block

    num_pairs = int(np.sum(row.block_pairs[:, 1] >= 0))
    pairs = row.block_pairs.copy()
    listed = place[pairs[:num_pairs]]
    pairs[:num_pairs] = listed[np.lexsort((listed[:, 1], listed[:, 0]))]
    return row._replace(
        token=row.token[tokens],
        position=row.position[tokens],
        group=row.group[tokens],
        branch=row.branch[tokens],
        target_source=follow(row.target_source),
        block_pairs=pairs,
        response_end=np.where(row.response_end >= 0, follow(row.response_end), -1),
    )
