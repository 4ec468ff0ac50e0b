"""A recipe: stages in order, each an ordinary run in `workdir/NN-name/`; a finished one is skipped."""

from etils import epath

from palign.config.load import in_stage
from palign.config.schema import Recipe
from palign.train.build import check_config
from palign.train.loop import run
from palign.train.metrics import say


def stage_workdirs(recipe: Recipe, workdir: epath.Path) -> dict[str, epath.Path]:
    """Where each stage runs: `workdir/NN-name/`, or `workdir` itself for a recipe of one."""
    if len(recipe.stages) == 1:
        return dict.fromkeys(recipe.stages, workdir)
    return {name: workdir / f"{i:02d}-{name}" for i, name in enumerate(recipe.stages, start=1)}


def run_recipe(recipe: Recipe, workdir: epath.Path, *, only: str = "") -> dict[str, dict[str, float]]:
    """Runs the stages.

    Args:
        recipe: resolved.
        workdir: of the recipe.
        only: the name of one stage to run; the stages it reads must have run before.

    Returns:
        The last evaluation of every stage that was run.

    Raises:
        ValueError: no stage of that name, or what `train.loop.run` raises.
    """
    if only and only not in recipe.stages:
        raise ValueError(f"--stage={only}: no such stage; there are {', '.join(recipe.stages)}")
    for name, config in recipe.stages.items():
        with in_stage(name, recipe.stages):
            check_config(config)
    metrics = {}
    for name, place in stage_workdirs(recipe, workdir).items():
        if only in ("", name):
            say(f"stage {name} in {place}")
            metrics[name] = run(recipe.stages[name], place)
    return metrics
