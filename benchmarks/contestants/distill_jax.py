"""AlignDistil's loss and its gradients with respect to the student's hidden states and unembedding, in JAX.

--side=fused      palign's head: chunks of targets, the gradient taken in the forward pass
--side=dense      `losses.aligndistil` on full logits, differentiated by `jax.grad`; it shares the closed forms
--side=textbook   the same formulas as one writes them down, with `jax.nn.log_softmax` and automatic differentiation
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contestants.distill_inputs import BETA0, EPSILON, SCALE, Inputs, digest, draw_inputs, make_parser
from benchmarks.worker import Done, serve
from palign import losses
from palign.heads.targets import Tower
from palign.heads.weighted_sum import weighted_sum
from palign.types import Batch, Unembedding

PACKAGES = ("jax", "jaxlib", "numpy")


def fused(x, w, frozen: Inputs, *, chunk: int):
    pairs = zip((x, *frozen.hidden), (w, *frozen.kernels), strict=True)
    towers = tuple(Tower(h[None], Unembedding(k, None, k.shape[1])) for h, k in pairs)
    unused, place = jnp.zeros((1, 1), jnp.int32), jnp.arange(x.shape[0])[None]  # every position predicts a token
    batch = Batch(*(unused,) * 4, place, jnp.zeros_like(place), jnp.ones_like(place), *(unused,) * 6)

    def at_targets(token, *logits):
        return losses.aligndistil(*logits, beta0=BETA0, scale=SCALE, epsilon=EPSILON), ()

    return weighted_sum(at_targets, jnp.full(place.shape, 1 / x.shape[0]), towers, batch, chunk=chunk)[0]


def dense(x, w, frozen: Inputs, *, chunk: int):
    logits = [h @ k for h, k in zip((x, *frozen.hidden), (w, *frozen.kernels), strict=True)]
    return jnp.mean(losses.aligndistil(*logits, beta0=BETA0, scale=SCALE, epsilon=EPSILON))


def textbook(x, w, frozen: Inputs, *, chunk: int):
    dpo, reverse = (h @ k for h, k in zip(frozen.hidden, frozen.kernels, strict=True))
    distance = 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(dpo) - jax.nn.softmax(reverse)), axis=-1)
    alpha = SCALE * distance + EPSILON
    teacher = jax.nn.log_softmax(dpo + alpha[:, None] * (dpo - reverse))
    student = jax.nn.log_softmax(x @ w)
    return jnp.mean(BETA0 / alpha * jnp.sum(jnp.exp(student) * (student - teacher), axis=-1))


SIDES = {"fused": fused, "dense": dense, "textbook": textbook}


def main() -> None:
    parser = make_parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--chunk", type=int, required=True, help="targets per trip of the fused head")
    parser.add_argument("--plan-targets", type=int, required=True, help="targets for which memory is planned, unrun")
    flags = parser.parse_args()
    both = jax.jit(jax.value_and_grad(functools.partial(SIDES[flags.side], chunk=flags.chunk), argnums=(0, 1)))
    drawn = draw_inputs(flags)
    x, w, frozen = jax.tree.map(
        jnp.asarray, (drawn.hidden[0], drawn.kernels[0], Inputs(drawn.hidden[1:], drawn.kernels[1:]))
    )
    compiled = both.lower(x, w, frozen).compile()
    hidden, kernel = (jax.ShapeDtypeStruct(s, np.float32) for s in ((flags.plan_targets, flags.width), w.shape))
    memory = both.lower(hidden, kernel, Inputs((hidden,) * 2, (kernel,) * 2)).compile().memory_analysis()
    planned = {"planned_temporary": memory.temp_size_in_bytes, "planned_results": memory.output_size_in_bytes}

    def take(index: int) -> Done:
        loss, gradients = jax.block_until_ready(compiled(x, w, frozen))
        norms = [float(jnp.linalg.norm(gradient)) for gradient in gradients]
        return Done(
            {"loss": float(loss), "dhidden": norms[0], "dkernel": norms[1]}, {"targets": flags.targets} | planned, {}
        )

    serve(take, packages=PACKAGES, same={"inputs": digest(drawn)}, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
