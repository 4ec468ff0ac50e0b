"""The quick start: train, compare and improve a small language model on a CPU, and look at the report.

python -m palign.cli.demo --workdir=runs/demo
"""

from collections.abc import Sequence

from etils import epath

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and runs the quick start."""
    parser = app.parser("palign.cli.demo", __doc__)
    parser.add_argument("--workdir", default="runs/demo")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="more steps and IPO besides")
    size.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    given = parser.parse_args(arguments)

    from palign.recipes import quickstart

    app.use_compilation_cache()
    chosen = quickstart.FULL if given.full else quickstart.SMOKE if given.smoke else quickstart.DEMO
    quickstart.quickstart(epath.Path(given.workdir), chosen)


if __name__ == "__main__":
    raise SystemExit(app.run(main))
