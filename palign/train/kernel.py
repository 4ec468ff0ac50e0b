"""Which form of attention a run uses: the one that its config names, or the fastest that agrees with the plain one."""

import functools
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from palign.attention.attend import KERNELS, attend
from palign.attention.walk import Kernel
from palign.config.schema import ModelConfig, RunConfig
from palign.data.loader import Dataset
from palign.models.config import compute_dtype, layer_tables
from palign.sharding.mesh import row_sharding, to_global
from palign.sharding.processes import is_main, local_rows
from palign.train.metrics import say

CHOICE = "attention.json"
PLAIN = "xla"
CANDIDATES = {"cpu": (PLAIN,), "gpu": (PLAIN, "pallas_gpu"), "tpu": (PLAIN, "pallas_tpu")}  # by platform
TOLERANCE = 0.02  # bfloat16 sums of weights that were rounded against another maximum
REPEATS = 5


class Trial(NamedTuple):
    """One layer's attention, forward and backward, on rows of the run."""

    seconds: float  # the least of several runs
    difference: float  # from the first form that ran: largest over largest value, the worst of output and gradients


def choose_kernel(config: RunConfig, workdir: epath.Path, mesh: Mesh, dataset: Dataset) -> str:
    """Chooses the form of attention, the same on every process, and prints what was measured in one line.

    The choice is kept in the workdir: a run that goes on, on devices of the same kind, computes as it did before.

    Args:
        config: `config.attention.kernel` is a name, or `auto`.
        workdir: of the run.
        mesh: its devices.
        dataset: the run's; its first micro-batch is what forms are tried on.

    Returns:
        A name in `palign.attention.attend.KERNELS`.

    Raises:
        ValueError: the named form does not run on these devices, or does not take blocks and heads of these sizes.
    """
    name, device = config.attention.kernel, mesh.devices.flat[0]
    candidates = find_candidates(name, device.platform)
    if name == PLAIN or candidates == (PLAIN,):
        return PLAIN
    inputs = _inputs(config, mesh, dataset)
    with jax.set_mesh(mesh):
        if name != "auto":
            jax.eval_shape(functools.partial(_attention, config.model, KERNELS[name]), *inputs)
            return name
        if before := _agreed(_remembered(workdir, device.device_kind), candidates):
            return before
        trials = try_kernels({name: KERNELS[name] for name in candidates}, config.model, mesh, inputs)
    chosen = _agreed(fastest(trials), candidates)
    if is_main():
        say(f"attention: {chosen} ({'; '.join(describe(name, trial) for name, trial in trials.items())})")
        (workdir / CHOICE).write_text(json.dumps({"kernel": chosen, "device": device.device_kind}))
    return chosen


def find_candidates(name: str, platform: str) -> tuple[str, ...]:
    """The forms that a platform can run.

    Raises:
        ValueError: the one that is asked for is not among them.
    """
    candidates = CANDIDATES.get(platform, (PLAIN,))
    if name not in ("auto", *candidates):
        raise ValueError(
            f"config.attention.kernel = {name!r} does not run on {platform}; expected auto or one of "
            f"{', '.join(candidates)}"
        )
    return candidates


def fastest(trials: Mapping[str, Trial | str]) -> str:
    """The name of the fastest of those that agree with the first.

    Args:
        trials: by name; the reason instead, where there was none.
    """
    agreeing = {n: t for n, t in trials.items() if isinstance(t, Trial) and t.difference <= TOLERANCE}
    return min(agreeing, key=lambda name: agreeing[name].seconds, default=PLAIN)


def describe(name: str, trial: Trial | str) -> str:
    """A trial in a few words."""
    if isinstance(trial, str):
        return f"{name}: {trial}"
    wrong = "" if trial.difference <= TOLERANCE else f", wrong: differs by {trial.difference:.1g}"
    return f"{name}: {1e3 * trial.seconds:.2f} ms a layer{wrong}"


def try_kernels(
    kernels: Mapping[str, Kernel], model: ModelConfig, mesh: Mesh, inputs: tuple[Any, ...]
) -> dict[str, Trial | str]:
    """Runs every form on the same random queries, keys and values. Call it under the mesh, on every process.

    Args:
        kernels: by name, the plain one first.
        model: gives the scale of the scores and their softcap.
        mesh: over which rows are spread.
        inputs: shapes of query, key, value and the output's cotangent; tokens; window.

    Returns:
        What was measured, or the first line of the error, by name.
    """
    draw = jax.jit(lambda: _draw(inputs[:4]), out_shardings=row_sharding(mesh))
    inputs = (*draw(), *inputs[4:])
    trials: dict[str, Trial | str] = {}
    expected = None
    for name, kernel in kernels.items():
        run = jax.jit(functools.partial(_attention, model, kernel))
        try:
            results = jax.block_until_ready(run(*inputs))
        except Exception as error:  # a form that does not compile for this chip is one that is not taken
            trials[name] = str(error).partition("\n")[0]
            continue
        expected = results if expected is None else expected
        trials[name] = Trial(_seconds(run, inputs), float(_difference(results, expected)))
    return trials


def _attention(model, kernel, query, key, value, cotangent, tokens, window):
    scale = model.head_width**-0.5 if model.query_scale is None else model.query_scale

    def run(*arrays):
        return attend(*arrays, *tokens, window, scale=scale, softcap=model.attention_softcap, kernel=kernel)

    output, pull_back = jax.vjp(run, query, key, value)
    return output, *pull_back(cotangent)


def _inputs(config, mesh, dataset):
    """Shapes of the arrays and the ids of the run's first micro-batch, as its first layer attends."""
    model, micro_batches = config.model, config.data.micro_batches
    own = local_rows(mesh, dataset.plan.rows_per_step // micro_batches)
    batch = dataset.step_batch(0, micro_batches=micro_batches, rows=own)
    batch = jax.tree.map(lambda leaf: leaf[0], to_global(mesh, batch))
    rows, length = batch.token.shape
    heads = (model.num_heads, model.num_key_heads, model.num_key_heads, model.num_heads)
    shapes = [jax.ShapeDtypeStruct((rows, length, n, model.head_width), compute_dtype(model)) for n in heads]
    tokens = (batch.position, batch.group, batch.branch, batch.block_pairs)
    tables, _ = layer_tables(model)
    return *shapes, tokens, jnp.asarray(tables.window[0])


def _draw(shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(key, s.shape, s.dtype) for key, s in zip(keys, shapes, strict=True))


@jax.jit
def _difference(results, expected):
    def relative(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))

    return jnp.max(jnp.stack(jax.tree.map(relative, results, expected)))


def _seconds(run, inputs):
    least = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        least = min(least, time.perf_counter() - start)
    return least


def _remembered(workdir, device_kind):
    file = workdir / CHOICE
    if not is_main() or not file.is_file():
        return None
    choice = json.loads(file.read_text())
    return choice["kernel"] if choice["device"] == device_kind else None


def _agreed(name, candidates):
    """The first process's name, on every process."""
    index = candidates.index(name) if name in candidates else -1
    index = int(multihost_utils.broadcast_one_to_all(np.int32(index)))
    return None if index < 0 else candidates[index]
