"""`palign.cli.train`, which writes down the examples that this process was given: `ids-PROCESS.json` in $RECORD.

With $STOP_AT set, process 1 gets SIGTERM after that step; steps then take half a second, as the news takes its time.
"""

import json
import os
import pathlib
import signal
import time

import jax

from palign.cli import app, train
from palign.train import loop


def record(seen):
    """Keeps the ids of every batch that the loop makes global; `[A, R, G]` a step."""
    to_global = loop.to_global

    def recorded(mesh, batch):
        seen.append(batch.example_id.tolist())
        return to_global(mesh, batch)

    return recorded


def main() -> int:
    seen: list = []
    loop.to_global = record(seen)
    stop, report = int(os.environ.get("STOP_AT", 0)), loop._report

    def report_and_stop(made, step, *rest):
        if step == stop and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5 * (0 < stop <= step))
        return report(made, step, *rest)

    loop._report = report_and_stop
    code = app.run(train.main)
    file = pathlib.Path(os.environ["RECORD"]) / f"ids-{jax.process_index()}.json"
    file.write_text(json.dumps(seen))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
