"""Small random trees, a tiny model, and batches of every layout: what the tests of the whole machine share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from palign.config.schema import ModelConfig
from palign.data.pack import pack_row, row_shape, stack_rows
from palign.data.tokenize import TokenTree
from palign.models.transformer import make_language_model
from palign.objectives.base import Context
from palign.objectives.compose import total_loss
from palign.types import Batch

VOCAB = 50
TINY = ModelConfig(
    vocab_size=VOCAB, num_layers=2, dim=16, num_heads=4, num_key_heads=2, hidden_dim=24, remat="none", dtype="float32"
)


def random_trees(seed: int, num: int, *, responses=(1, 8), longest: int = 7) -> list[TokenTree]:
    """Trees with `responses` many responses each (a range, mixed), a one-token response in every one."""
    rng = np.random.default_rng(seed)
    trees = []
    for i in range(num):
        K = int(rng.integers(responses[0], responses[1] + 1))
        lengths = rng.integers(1, longest + 1, size=K)
        lengths[rng.integers(K)] = 1
        draw = functools.partial(rng.integers, 3, VOCAB, dtype=np.int32)
        prompt, answers = draw(size=rng.integers(1, 9)), tuple(draw(size=n) for n in lengths)
        trees.append(TokenTree(prompt, answers, tuple(float(x) for x in rng.permutation(K)), i))
    return trees


def make_batch(
    trees, *, layout="packed", rows=6, used=6, tokens=128, responses=8, pair_policy="best_worst", block=16, trees_cap=8
) -> Batch:
    """Trees dealt out in turn to the first `used` of the rows, as jax arrays `[R, ...]`."""
    shape = row_shape(tokens, trees=trees_cap, responses=responses, pair_policy=pair_policy, block=block)
    dealt = [trees[r::used] if r < used else [] for r in range(rows)]
    return jax.tree.map(jnp.asarray, stack_rows([pack_row(row, shape, pair_policy, layout, seed=0) for row in dealt]))


@functools.cache
def tiny_model():
    """The tiny language model and two different sets of its parameters."""
    lm = make_language_model(TINY)

    @jax.jit
    def init(key):
        # Confident predictions: between nearly uniform ones a divergence is the small difference of large numbers.
        return jax.tree_util.tree_map_with_path(lambda path, x: 20 * x if "embedding" in str(path) else x, lm.init(key))

    return lm, init(jax.random.key(0)), init(jax.random.key(1))


def evaluate_objective(objective, params, aux, batch, carry=None):
    """Loss and metrics of one micro-batch that is the whole batch."""
    statistics = {}
    if objective.statistics:
        measured = objective.statistics(params, aux, batch)
        combined = objective.combine(jax.tree.map(lambda x: x[None], measured))
        statistics = jax.lax.stop_gradient(jax.tree.map(lambda x: x[0], combined))
    context = Context(statistics, objective.init_carry() if carry is None else carry)
    out = objective.loss(params, aux, batch, context)
    return total_loss(objective, out.terms, objective.counts(batch)), out.metrics


def largest_difference(tree, other) -> float:
    """The largest difference over the largest value, of the worst leaf; NaN where there is one."""
    ratios = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(y)), 1e-30), tree, other)
    return float(np.max(jax.tree.leaves(ratios)))  # unlike Python's max, which may pass over a NaN


def random_ids(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """`[3, tokens]` group, branch, position of a row of random trees, with padding at its end or none."""
    columns, group = [], 0
    while len(columns) < tokens and rng.random() > 0.1:
        group += 1
        prompt = int(rng.integers(1, 20))
        columns += [(group, 0, p) for p in range(prompt)]
        for k in range(1, int(rng.integers(1, 7)) + 1):
            columns += [(group, k, prompt + p) for p in range(int(rng.integers(1, 14)))]
    columns = columns[:tokens] + [(0, 0, 0)] * (tokens - len(columns))
    return np.array(columns, np.int32).T
