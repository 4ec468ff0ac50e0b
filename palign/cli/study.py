"""Train every method over seeds and settings in the embedded world, and write a table and a page of what each is worth.

python -m palign.cli.study --config=configs/study.py --workdir=runs/study

`--config=configs/study.py:full` is the whole of it. The same command again goes on where it was stopped, and
`--minutes=60` stops it in time.
"""

from collections.abc import Sequence

from etils import epath

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, runs the jobs that are left, and writes the report."""
    parser = app.parser("palign.cli.study", __doc__)
    parser.add_argument(
        "--config", default="configs/study.py", help="a Python file with get_config(size); :SIZE behind"
    )
    parser.add_argument("--workdir", default="runs/study")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no job that would end later; 0 = run all")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a setting, e.g. --config.seeds='(0,)'")
    flags = [a for a in arguments if not a.startswith("--config.")]
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    given = parser.parse_args(flags)
    if given.minutes < 0:
        raise ValueError(f"--minutes={given.minutes:g}: expected 0 (no limit) or more")

    from palign.config.load import load_plain, resolve_as
    from palign.recipes.study import run_study
    from palign.recipes.study_config import StudyConfig
    from palign.recipes.study_report import write

    config, workdir = resolve_as(StudyConfig, load_plain(given.config, overrides)), epath.Path(given.workdir)
    app.use_compilation_cache()
    finished = run_study(config, workdir, minutes=given.minutes)
    if finished:
        write(config, workdir, finished, " ".join(["python -m palign.cli.study", *arguments]))


if __name__ == "__main__":
    raise SystemExit(app.run(main))
