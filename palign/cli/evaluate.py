"""Evaluate a run's checkpoint on records: the metrics of its objective, each example counted once.

python -m palign.cli.evaluate --workdir=runs/dpo@best --data=heldout.jsonl
"""

from collections.abc import Sequence

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and prints the metrics."""
    parser = app.parser("palign.cli.evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="of a run; @STEP, @last or @best behind it")
    parser.add_argument("--data", default="", help="a data file; by default the run's own held-out sets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    app.add_process_flags(parser)
    given = parser.parse_args(arguments)

    from palign.report.contents import Cell, Row, Table
    from palign.report.table import print_table
    from palign.sharding.processes import is_main
    from palign.train.evaluate import evaluate_run

    app.begin(given)
    metrics = evaluate_run(given.workdir, given.data)
    if not is_main():
        return
    if given.json:
        import json

        print(json.dumps(metrics, indent=1))
        return
    rows = [Row(name, (Cell(value, digits=4),)) for name, value in sorted(metrics.items())]
    print_table(Table(("value",), tuple(rows), label="metric", caption=given.workdir))


if __name__ == "__main__":
    raise SystemExit(app.run(main))
