"""Evaluating a checkpoint on records that its run may never have seen."""

import dataclasses

import jax
from etils import epath

from palign.models.hf import is_hf
from palign.objectives.lora import BASE
from palign.sharding.mesh import make_mesh
from palign.train.build import assemble, evaluate, find_sources
from palign.train.checkpoint import load_models
from palign.train.digest import digest
from palign.train.prepare_once import prepare_cached
from palign.train.sources import Source, check_base, read_config


def evaluate_run(name: str, path: str = "") -> dict[str, float]:
    """Evaluates a run's objective.

    Args:
        name: the run's workdir; `@STEP`, `@last` or `@best` behind it.
        path: a data file, which becomes the set `data`; "" for the run's own held-out sets.

    Returns:
        `eval_SET_METRIC` -> value.

    Raises:
        ValueError: no such run or checkpoint, bad data, no held-out set.
    """
    place, _, which = name.partition("@")
    workdir = epath.Path(place)
    config = read_config(workdir)
    if is_hf(workdir):
        raise ValueError(f"{workdir}: not the workdir of a run; make it one with palign.cli.convert --from={workdir}")
    if config.objective.reference == "cached":  # one pass: nothing to save by caching
        config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, reference="live"))
    if path:
        only = dataclasses.replace(
            config.data, path=path, mixture={}, cache="", eval_fraction=0.0, eval_paths={}, limit=0
        )
        config = dataclasses.replace(config, data=only)
    data = prepare_cached(config, workdir, None)
    if path:
        data = data._replace(evals={"data": data.train.once()})
    if not data.evals:
        raise ValueError(f"{workdir}: the run held nothing out; name a file with --data")
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    # Nothing is trained: neither where the policy began nor the schedule over these records matters.
    optimizer = dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0, warmup_ratio=None)
    start = config.init_from if config.lora.rank else ""
    config = dataclasses.replace(config, init_from=start, optimizer=optimizer)
    made, state = assemble(config, workdir, mesh, data, find_sources(config, workdir))
    if config.lora.rank:
        check_base(Source(workdir, which or "last"), digest(made.aux[BASE]))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, made.shardings)
    return evaluate(made, load_models(workdir, which or "last", shapes))
