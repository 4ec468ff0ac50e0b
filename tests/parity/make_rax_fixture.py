"""Records the values of RAX's ranking losses on random lists, as `rax_values.npz` beside this.

Run by hand, in an environment of its own; neither palign nor its tests need rax:

    pip install "rax==0.4.0" "jax==0.10.2"
    python tests/parity/make_rax_fixture.py

All is in float64. Per list length K the file holds the inputs, as palign takes them, and each loss summed over the
valid terms of each list (`reduce_fn=jnp.sum`, one list at a time): RAX's own default is a mean over the whole batch.
Every list has at least one valid response: RAX's softmax of none is not a number.
"""

import importlib.metadata
import json
import pathlib
import platform

import jax
import jax.numpy as jnp
import numpy as np
import rax

HERE = pathlib.Path(__file__).parent
LENGTHS, LISTS, SEED = (2, 5, 8), 8, 11


def lambda_weighted(scores, labels, **options):
    return rax.pairwise_logistic_loss(scores, labels, lambdaweight_fn=rax.dcg_lambdaweight, **options)


def softmax_of_labels(scores, labels, **options):
    return rax.softmax_loss(scores, labels, label_fn=lambda a, where: jax.nn.softmax(a, where=where), **options)


# Name in the file -> RAX's loss, and which labels it gets.
LOSSES = {
    "softmax": (rax.softmax_loss, "labels"),
    "softmax_of_labels": (softmax_of_labels, "labels"),
    "pairwise_logistic": (rax.pairwise_logistic_loss, "labels"),
    "pairwise_hinge": (rax.pairwise_hinge_loss, "labels"),
    "pairwise_mse": (rax.pairwise_mse_loss, "labels"),
    "pointwise_sigmoid": (rax.pointwise_sigmoid_loss, "labels"),
    "pointwise_mse": (rax.pointwise_mse_loss, "labels"),
    "lambda_pairwise_logistic": (lambda_weighted, "labels"),
    # RAX breaks ties by position, palign fits a tied block together: a strict ranking.
    "listmle": (rax.listmle_loss, "ranking"),
}


def inputs(length):
    """Scores, labels in [0, 1] with ties, a ranking without, and masks that leave at least one response."""
    rng = np.random.default_rng([SEED, length])
    valid = rng.random((LISTS, length)) < 0.7
    valid[np.arange(LISTS), rng.integers(0, length, LISTS)] = True
    valid[0], valid[1, :2] = True, (False, True)
    return {
        "scores": rng.normal(0.0, 1.5, (LISTS, length)),
        "labels": rng.integers(0, 5, (LISTS, length)) / 4,
        "ranking": np.argsort(rng.random((LISTS, length))).astype(np.float64),
        "valid": valid,
    }


def main():
    """Write the file."""
    jax.config.update("jax_enable_x64", True)
    recorded = {}
    for length in LENGTHS:
        arrays = inputs(length)
        recorded |= {f"{length}/{name}": array for name, array in arrays.items()}
        for name, (loss, target) in LOSSES.items():

            def one_list(scores, labels, valid, loss=loss):
                return loss(scores, labels, where=valid, reduce_fn=jnp.sum)

            values = jax.vmap(one_list)(arrays["scores"], arrays[target], arrays["valid"])
            assert values.dtype == jnp.float64 and np.isfinite(values).all(), name
            recorded[f"{length}/{name}"] = np.asarray(values)
    versions = {name: importlib.metadata.version(name) for name in ("rax", "jax", "jaxlib", "numpy")}
    provenance = {"python": platform.python_version(), "seed": SEED, "lengths": LENGTHS, **versions}
    np.savez_compressed(HERE / "rax_values.npz", provenance=json.dumps(provenance, sort_keys=True), **recorded)


if __name__ == "__main__":
    main()
