"""Run a command as several processes on this machine, on CPU devices: for tests and demonstrations.

python -m palign.cli.launch --processes=2 --devices=2 -- \
    python -m palign.cli.train --config=configs/dpo.py --config.data.path=pairs.jsonl --workdir=runs/dpo

What the processes print has their number in front. SIGTERM and SIGINT go to all of them; when one fails the others are
ended, and its exit code is the launcher's.
"""

from collections.abc import Sequence

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, runs the processes and exits with the code of the first that failed."""
    parser = app.parser("palign.cli.launch", __doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    parser.add_argument("command", nargs="+", help="after --; gets --coordinator, --processes and --process")
    given = parser.parse_args(arguments)
    if given.processes < 1 or given.devices < 1:
        raise ValueError(f"--processes={given.processes} --devices={given.devices}: expected 1 or more of both")

    from palign.sharding.loopback import launch

    raise SystemExit(launch(given.command, processes=given.processes, devices=given.devices))


if __name__ == "__main__":
    raise SystemExit(app.run(main))
