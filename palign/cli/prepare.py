"""Validate and tokenise data once, into a directory that any number of runs read by index.

python -m palign.cli.prepare --config=configs/dpo.py --config.data.path=pairs.jsonl --output=prepared
python -m palign.cli.train --config=configs/dpo.py --config.data.path=prepared --workdir=runs/dpo
"""

import pathlib
from collections.abc import Sequence

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, prepares and prints what is there now."""
    parser = app.parser("palign.cli.prepare", __doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the data go")
    parser.add_argument("--stage", default="", help="of a recipe; the last one if not named")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a setting, e.g. --config.data.path=pairs.jsonl")
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    given = parser.parse_args([a for a in arguments if not a.startswith("--config.")])

    from palign.config.load import load_stage
    from palign.report.contents import Cell, Row, Table
    from palign.report.table import print_table
    from palign.train.prepare_once import prepare_once

    manifest = prepare_once(load_stage(given.config, overrides, given.stage), given.output)
    rows = []
    for name, known in manifest["sets"].items():
        dropped = sum(n for reason, n in known["counts"].items() if reason.startswith(("dropped_", "skipped/")))
        figures = (known["trees"], known["counts"]["responses"], known["counts"]["truncated"], dropped)
        rows.append(Row(name, tuple(Cell(float(figure), digits=0) for figure in figures)))
    columns = ("examples", "responses", "truncated", "dropped")
    print_table(Table(columns, tuple(rows), label="set", caption=str(pathlib.Path(given.output))))


if __name__ == "__main__":
    raise SystemExit(app.run(main))
