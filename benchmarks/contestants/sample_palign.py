"""palign's sampler: prompts computed once, their cache shared by K samples, one compiled loop."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks import cases
from benchmarks.contestants.prompts import make_step, pad, parse
from benchmarks.worker import serve
from palign.generate.sample import make_sampler
from palign.models.hf import describe, load_weights
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from palign.sharding.rules import parameter_shardings

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def main() -> None:
    flags = parse(__doc__)
    directory, mesh = epath.Path(flags.case), make_mesh(data=1, devices=jax.devices()[:1])
    lm = make_language_model(describe(directory).model)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    places = parameter_shardings(mesh, shapes)
    params = load_weights(
        directory, jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
    )
    rounds = cases.read_rounds(flags.case)
    samplers = {
        temperature: make_sampler(
            lm, samples=flags.samples, max_new_tokens=flags.new_tokens, eos_ids=(), temperature=temperature
        )
        for temperature in (0.0, flags.temperature)
    }

    def draw(index: int, temperature: float) -> np.ndarray:
        token, real = pad(rounds[index], "right")
        drawn = samplers[temperature](params, jnp.asarray(token), jnp.asarray(real.sum(1)), jax.random.key(index))
        return np.asarray(drawn.token)

    for temperature in samplers:
        draw(0, temperature)  # compiles, not timed

    def count() -> dict[str, float]:
        return {"recompilations": sum(sampler._cache_size() - 1 for sampler in samplers.values())}

    same = {"weights": cases.weights_digest(flags.case)}
    serve(make_step(flags, draw, count), packages=PACKAGES, same=same, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
