"""Look at data before training: what they are, what is odd about them, and what the model will see.

python -m palign.cli.inspect --config.data.path=pairs.jsonl --output=data.html
python -m palign.cli.inspect --config=configs/dpo.py --stage=sft --config.data.path=pairs.jsonl --output=data.html
"""

from collections.abc import Sequence

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, prints the figures and writes the page."""
    parser = app.parser("palign.cli.inspect", __doc__)
    parser.add_argument("--config", default="", help="a Python file with get_config(); without it, the defaults")
    parser.add_argument("--output", default="", metavar="PAGE", help="an .html file; without it, the figures only")
    parser.add_argument("--stage", default="", help="of a recipe; the last one if not named")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a setting, e.g. --config.data.path=pairs.jsonl")
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    given = parser.parse_args([a for a in arguments if not a.startswith("--config.")])

    from palign.config.load import load_stage
    from palign.recipes.inspect import inspect

    inspect(load_stage(given.config, overrides, given.stage), given.output)


if __name__ == "__main__":
    raise SystemExit(app.run(main))
