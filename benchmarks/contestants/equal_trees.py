"""palign's step on rows of equal trees: prompts of P tokens with K responses of R each, against a uniform reference.

--layout=packed      the prompt once
--layout=unshared    the prompt again before every response; attention by block pairs
--layout=repeated    the same, each copy a sequence of its own under dense causal attention, as on a padded row
--optimizer=none     the gradient and its norm alone
"""

import argparse
import functools
import hashlib
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.worker import Done, serve
from palign.config.schema import ModelConfig, OptimizerConfig
from palign.data.pack import pack_row, row_shape, stack_rows, tree_tokens
from palign.data.tokenize import TokenTree
from palign.models.protocol import LanguageModel
from palign.models.transformer import Transformer, TreeContext, make_language_model
from palign.objectives.compose import make_objective
from palign.sharding.mesh import make_mesh, to_global
from palign.train.metrics import to_floats
from palign.train.optimizer import make_optimizer
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step
from palign.types import Batch, Mean

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
BATCHES = 4  # different ones
OPTIMIZERS = {
    "adamw": lambda: make_optimizer(OptimizerConfig(schedule="constant", warmup_ratio=0.0), 1000),
    "none": optax.set_to_zero,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--prompt", type=int, default=256, help="P")
    parser.add_argument("--response", type=int, default=64, help="R")
    parser.add_argument("--responses", type=int, default=2, help="K")
    parser.add_argument("--trees", type=int, default=1, help="of a row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--method", default="dpo")
    parser.add_argument("--layout", choices=("packed", "unshared", "repeated"), default="packed")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256, help="of the model; heads are 32 wide")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def model_of(flags: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        vocab_size=flags.vocabulary,
        num_layers=flags.layers,
        dim=flags.width,
        num_heads=flags.width // 32,
        num_key_heads=flags.width // 32,
        hidden_dim=-(-8 * flags.width // 48) * 16,
        tie_embedding=False,
        dtype="float32",
    )


def draw_trees(flags: argparse.Namespace, which: int) -> list[TokenTree]:
    """A batch of random tokens; the later a response, the better, scored from 0 to 1 like LiPO's labels."""
    draw = functools.partial(np.random.default_rng((flags.seed, which)).integers, 0, flags.vocabulary, dtype=np.int32)
    scores = tuple(map(float, np.linspace(0, 1, flags.responses)))
    return [
        TokenTree(draw(size=flags.prompt), tuple(draw(size=flags.response) for _ in scores), scores, i)
        for i in range(flags.rows * flags.trees)
    ]


def pack(flags: argparse.Namespace, trees: list[TokenTree]) -> Batch:
    """The batch `[R, ...]`; to a uniform reference every token of a vocabulary is alike."""
    layout = "packed" if flags.layout == "packed" else "unshared"
    needed = flags.trees * tree_tokens(flags.prompt, [flags.response] * flags.responses, layout)
    shape = row_shape(-(-needed // 64) * 64, trees=flags.trees, responses=flags.responses)
    rows = [trees[r * flags.trees : (r + 1) * flags.trees] for r in range(flags.rows)]
    batch = stack_rows([pack_row(row, shape, "best_worst", layout, seed=0) for row in rows])
    uniform = np.where(batch.target_slot > 0, np.float32(-math.log(flags.vocabulary)), np.float32(0))
    return batch._replace(reference_logps=uniform)


def make_model(flags: argparse.Namespace) -> LanguageModel:
    """The language model; where prompts are repeated as others do, with its attention replaced."""
    config = model_of(flags)
    lm = make_language_model(config)
    if flags.layout != "repeated":
        return lm
    transformer = Transformer(config, jnp.float32, functools.partial(attend_copies, flags.prompt + flags.response))

    def hidden(params, batch):
        context = TreeContext(batch.position, batch.group, batch.branch, batch.block_pairs)
        return transformer.apply({"params": params}, batch.token, context, None)[0]

    return lm._replace(hidden=hidden)


def attend_copies(length, q, k, v, window, cache, context, *, scale, softcap):
    """Dense causal attention within every copy of prompt and response, `length` tokens each."""
    shape = q.shape
    q, k, v = (x.reshape(-1, length, *x.shape[2:]) for x in (q, k, v))
    scores = jnp.einsum("rqhd,rkhd->rhqk", q, k) * scale
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    return jnp.einsum("rhqk,rkhd->rqhd", weights, v).reshape(shape), None


def make_step(flags: argparse.Namespace) -> tuple[Callable[[int], dict[str, Mean]], str]:
    """What takes step i and returns its metrics when they are there; a digest of the weights that it starts from."""
    lm, mesh, tx = make_model(flags), make_mesh(data=1, devices=jax.devices()[:1]), OPTIMIZERS[flags.optimizer]()
    objective = make_objective(lm, [flags.method], hyper={"beta": 0.1}, cached_reference=True)
    step = make_train_step(objective, tx, mesh, state_shardings(mesh, lm, tx), {})
    state = init_state(mesh, lm, tx, seed=0)
    packed = [pack(flags, draw_trees(flags, which)) for which in range(BATCHES)]
    batches = [to_global(mesh, jax.tree.map(lambda x: x[None], batch)) for batch in packed]

    def take(index: int) -> dict[str, Mean]:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, {}, batches[index % BATCHES]))
        return metrics

    return take, digest(map(np.asarray, jax.tree.leaves(state.params)))


def main() -> None:
    flags = parse()
    step, weights = make_step(flags)

    def take(index: int) -> Done:
        values = to_floats(step(index))
        trees = draw_trees(flags, index % BATCHES)
        ids = digest(part for tree in trees for part in (tree.prompt, *tree.responses))
        work = {"lists": len(trees)}
        return Done({name: values[name] for name in ("loss", "grad_norm")}, work, {"ids": ids, "weights": weights})

    serve(take, packages=PACKAGES, same={}, device=jax.devices()[0].device_kind)


def digest(arrays: Iterable[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(array.tobytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    main()
