"""Hugging Face models: what transformers computed with them, and every way in which their files can be wrong."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from palign.data.tokenize import TokenTree
from palign.heads.targets import finish_logits
from palign.models.hf import describe, load_weights
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from palign.sharding.rules import parameter_shardings
from tests.trees import make_batch

HF = epath.Path(pathlib.Path(__file__).parents[1] / "fixtures" / "hf")
EXPECTED = np.load(HF / "expected.npz")
MODELS = sorted(EXPECTED.files[1:])


def load(directory, model=None, mesh=None, dtype=""):
    model = model or describe(directory).model
    mesh = mesh or make_mesh(data=1, devices=jax.devices()[:1])
    shapes = jax.eval_shape(make_language_model(model).init, jax.random.key(0))
    target = lambda shape, place: jax.ShapeDtypeStruct(shape.shape, dtype or shape.dtype, sharding=place)
    return load_weights(directory, jax.tree.map(target, shapes, parameter_shardings(mesh, shapes)))


@functools.cache
def rows():
    """The fixtures' token ids as rows of one tree each."""
    trees = [TokenTree(ids[:-1], (ids[-1:],), (0.0,), i) for i, ids in enumerate(EXPECTED["token"].astype(np.int32))]
    return make_batch(trees, rows=2, used=2, tokens=16)


def outputs(model, params):
    """Logits at every position, or the values of a reward model."""
    lm = make_language_model(model)

    @jax.jit
    def run(params, batch):
        hidden = lm.hidden(params, batch)
        if lm.values:
            return lm.values(params, hidden)
        kernel, softcap, vocab_size = lm.unembed(params)
        raw = jnp.matmul(hidden, kernel, precision="highest").reshape(-1, kernel.shape[1])
        return finish_logits(raw, softcap, vocab_size).reshape(*hidden.shape[:2], -1)[..., :vocab_size]

    return np.asarray(run(params, rows()))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_transformers_computes(name):
    found = outputs(describe(HF / name).model, load(HF / name))
    assert np.abs(EXPECTED[name]).max() > 0.5
    np.testing.assert_allclose(found, EXPECTED[name], rtol=0, atol=1e-5)
