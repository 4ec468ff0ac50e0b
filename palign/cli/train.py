"""Train what a config describes: one run, or the stages of a recipe.

python -m palign.cli.train --config=configs/dpo.py --config.data.path=pairs.jsonl --workdir=runs/dpo

Any setting is overridden by `--config.key.key=value`. The same command again goes on where it was stopped.
"""

from collections.abc import Sequence

from etils import epath

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and trains."""
    parser = app.parser("palign.cli.train", __doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--workdir", required=True, help="where checkpoints, metrics and logs go")
    parser.add_argument("--stage", default="", help="run one stage of a recipe")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a setting, e.g. --config.objective.beta=0.2")
    app.add_process_flags(parser)
    flags = [a for a in arguments if not a.startswith("--config.")]
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    given = parser.parse_args(flags)

    from palign.config.load import load_recipe

    recipe = load_recipe(given.config, overrides)

    app.begin(given)

    from palign.recipes.stages import run_recipe  # after the config: a slip in it is answered at once

    run_recipe(recipe, epath.Path(given.workdir), only=given.stage)


if __name__ == "__main__":
    raise SystemExit(app.run(main))
