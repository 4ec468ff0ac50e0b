"""Turn a Hugging Face model into a workdir that reads as a run, or a run into a model that transformers loads.

python -m palign.cli.convert --from=models/Qwen2.5-0.5B --to=runs/base
python -m palign.cli.convert --from=runs/dpo@best --to=exported --dtype=bfloat16
"""

from collections.abc import Sequence

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, converts and prints what was."""
    parser = app.parser("palign.cli.convert", __doc__)
    parser.add_argument(
        "--from", required=True, dest="name", help="a Hugging Face model's directory, or a run's workdir"
    )
    parser.add_argument("--to", required=True, help="a directory that is not there yet")
    parser.add_argument("--dtype", default="float32", help="of the weights that are written: float32, bfloat16")
    parser.add_argument("--adapter", action="store_true", help="of a LoRA run: its factors alone, for PEFT")
    app.add_process_flags(parser)
    given = parser.parse_args(arguments)

    from palign.report.contents import Cell, Row, Table
    from palign.report.table import print_table
    from palign.sharding.processes import is_main
    from palign.train.convert import convert

    app.begin(given)
    written, seconds = convert(given.name, given.to, dtype=given.dtype, adapter=given.adapter)
    if not is_main():
        return
    figures = (
        Cell(float(written.tensors), digits=0),
        Cell(float(written.parameters), digits=0),
        Cell(written.bytes / 1e6, digits=1),
        Cell(seconds, digits=1),
    )
    columns = ("tensors", "parameters", "MB", "seconds")
    print_table(Table(columns, (Row(written.architecture, figures),), label="architecture", caption=given.to))


if __name__ == "__main__":
    raise SystemExit(app.run(main))
