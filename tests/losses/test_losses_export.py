"""One loss of each signature leaves the process and comes back: `jax.export` with symbolic batch and list sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from palign import losses

B, K = export.symbolic_shape("b, k")
V = 7
PAIR, LIST, ONE = (B, 2), (B, K), (B,)
F, I, M = jnp.float32, jnp.int32, jnp.bool_

# Name -> loss, shapes and types of its arrays.
SIGNATURES = {
    "pairs": (losses.dpo, [(PAIR, F)] * 2),
    "pairs without a reference": (losses.simpo, [(PAIR, F)]),
    "pairs and lengths": (losses.ln_dpo, [(PAIR, F), (PAIR, F), (PAIR, I)]),
    "pairs and a statistic": (losses.aot_unpaired, [(PAIR, F)] * 3),
    "a statistic of the batch": (losses.aot_matched_margins, [(PAIR, F), (PAIR, F), (ONE, M)]),
    "pairs and a threshold": (losses.spa, [(PAIR, F), (PAIR, F), (PAIR, F), ((), F)]),
    "single responses": (losses.kto, [(ONE, F), (ONE, F), (ONE, M), ((), F)]),
    "lists": (losses.lipo_lambda, [(LIST, F), (LIST, F), (LIST, F), (LIST, M)]),
    "rewards": (losses.bradley_terry_margin, [(PAIR, F), (ONE, F)]),
    "tokens": (losses.nll, [(ONE, F)]),
    "distributions": (losses.reverse_kl, [((B, V), F)] * 2),
    "distributions and tokens": (losses.pld, [((B, V), F), ((B, V), F), (ONE, I)]),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_it_comes_back_the_same_at_other_sizes(name):
    loss, arrays = SIGNATURES[name]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]
    stored = export.export(jax.jit(loss), platforms=["cpu", "tpu", "cuda"])(*shapes).serialize()
    back = export.deserialize(stored)
    rng, sizes = np.random.default_rng(0), {"b": 5, "k": 4}
    given = []
    for shape, dtype in arrays:
        concrete = tuple(sizes.get(str(n), n) for n in shape)
        values = rng.normal(size=concrete) if dtype == F else rng.integers(0 if dtype == M else 1, 2, concrete)
        given.append(jnp.asarray(values, dtype))
    np.testing.assert_allclose(back.call(*given), loss(*given), rtol=1e-6, atol=1e-6)
