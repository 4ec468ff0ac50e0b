"""Write what a run's model says of each record beside it, and drop the records that would displace likelihood.

python -m palign.cli.annotate --workdir=runs/sft --data=pairs.jsonl --out=annotated.jsonl \
    --keep_quantile=ches_normalised:0:0.95 --filtered=kept.jsonl
"""

from collections.abc import Sequence

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, writes the files and prints a table."""
    parser = app.parser("palign.cli.annotate", __doc__)
    parser.add_argument("--workdir", required=True, help="of a run; @STEP, @last or @best behind it")
    parser.add_argument("--data", required=True, help="a data file of pairs or lists")
    parser.add_argument("--out", required=True, help="a .jsonl file: each record with its annotations")
    parser.add_argument("--reference", default="", help="another run, for reward_margin and difficulty")
    parser.add_argument("--keep_quantile", default="", metavar="NAME:LOW:HIGH", help="which records --filtered keeps")
    parser.add_argument("--filtered", default="", help="a .jsonl file: the kept records as they were given")
    given = parser.parse_args(arguments)

    import numpy as np

    from palign.report.contents import Cell, Row, Table
    from palign.report.table import print_table
    from palign.train.annotate import annotate_run

    app.use_compilation_cache()
    found = annotate_run(
        given.workdir,
        given.data,
        given.out,
        reference=given.reference,
        keep_quantile=given.keep_quantile,
        filtered=given.filtered,
    )
    quantiles = (0.05, 0.5, 0.95)
    rows = []
    for name, values in found.items():
        figures = (np.nanmean(values), *np.nanquantile(values, quantiles))
        rows.append(Row(name, tuple(Cell(float(figure), digits=4) for figure in figures)))
    columns = ("mean", *(f"{quantile:.0%}" for quantile in quantiles))
    print_table(Table(columns, tuple(rows), label="annotation", caption=given.out))


if __name__ == "__main__":
    raise SystemExit(app.run(main))
