"""A head in JAX: mean loss, and its gradients with respect to the student's hidden states and kernel.

--what=logps         the negative log-probability of target tokens
--what=divergence    Jensen-Shannon's, of a student and a teacher
--side=palign        in chunks of targets
--side=full          full logits, differentiated by `jax.grad`
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.contestants.head_inputs import Inputs, draw, parse
from benchmarks.contestants.plain_jax import device_peak
from benchmarks.worker import Done, serve
from palign import losses
from palign.heads.target_values import target_logps
from palign.heads.targets import Tower
from palign.heads.weighted_sum import weighted_sum
from palign.types import Batch, Unembedding

PACKAGES = ("jax", "jaxlib", "numpy")


def list_targets(token) -> Batch:
    """Every position of one row predicts a token."""
    unused, place = jnp.zeros((1, 1), jnp.int32), jnp.arange(token.size)[None]
    return Batch(*(unused,) * 4, place, token[None], jnp.ones_like(place), *(unused,) * 6)


def tower(hidden, kernel) -> Tower:
    return Tower(hidden[None], Unembedding(kernel, None, kernel.shape[1]))


def chunked_logps(x, w, frozen: Inputs, token, *, chunk: int):
    return -jnp.mean(target_logps(*tower(x, w), list_targets(token), chunk=chunk))


def chunked_divergence(x, w, frozen: Inputs, token, *, chunk: int):
    def at_targets(token, student, teacher):
        return losses.generalised_jsd(student, teacher), ()

    towers = (tower(x, w), tower(frozen.hidden[0], frozen.kernels[0]))
    weights = jnp.full((1, token.size), 1 / token.size)
    return weighted_sum(at_targets, weights, towers, list_targets(token), chunk=chunk)[0]


def full_logps(x, w, frozen: Inputs, token, *, chunk: int):
    logps = jax.nn.log_softmax((x @ w).astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logps, token[:, None], axis=-1))


def full_divergence(x, w, frozen: Inputs, token, *, chunk: int):
    student, teacher = ((h @ k).astype(jnp.float32) for h, k in ((x, w), (frozen.hidden[0], frozen.kernels[0])))
    return jnp.mean(losses.generalised_jsd(student, teacher))


SIDES = {
    ("logps", "palign"): chunked_logps,
    ("logps", "full"): full_logps,
    ("divergence", "palign"): chunked_divergence,
    ("divergence", "full"): full_divergence,
}


def main() -> None:
    flags = parse(__doc__, ("palign", "full"))
    drawn, token, digest = draw(flags)
    dtype = jnp.dtype(flags.dtype)
    (x, *hidden), (w, *kernels) = jax.tree.map(lambda array: jnp.asarray(array, dtype), tuple(drawn))
    del drawn
    loss = functools.partial(SIDES[flags.what, flags.side], chunk=flags.chunk)
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    norm = jax.jit(lambda gradient: jnp.linalg.norm(gradient.astype(jnp.float32)))
    arguments = (x, w, Inputs(tuple(hidden), tuple(kernels)), jnp.asarray(token))

    def take(index: int) -> Done:
        value, gradients = jax.block_until_ready(both(*arguments))
        dhidden, dkernel = map(float, map(norm, gradients))
        return Done({"loss": float(value), "dhidden": dhidden, "dkernel": dkernel}, {"targets": flags.targets}, {})

    device = jax.devices()[0].device_kind
    serve(take, packages=PACKAGES, same={"inputs": digest}, device=device, device_peak=device_peak)


if __name__ == "__main__":
    main()
