"""The study: every method over seeds and settings in the embedded world.

A job is an ordinary run in `workdir/seed-S/NN-name/`, with `result.json` beside its own files. A job that has one is
left alone, so the same command goes on where it was stopped, and a larger study takes over a smaller one's jobs.
"""

import dataclasses
import json
import shutil
import time
import zlib
from typing import Any

from etils import epath

from palign.config.load import resolve_run
from palign.config.schema import RunConfig
from palign.recipes.study_config import (
    DPO,
    REVERSE_DPO,
    SFT,
    Job,
    StudyConfig,
    job_config,
    list_jobs,
    middle_job,
    sft_config,
)
from palign.recipes.study_data import data_path, write_corpus_of, write_data
from palign.recipes.study_measures import Heldout, Point, Result, Rewards, hold_out, measure
from palign.recipes.study_summary import Entry
from palign.recipes.world_runs import checkpoint_steps
from palign.train.build import check_same_config
from palign.train.checkpoint import FOLDER
from palign.train.loop import FINISHED, TrainingDivergedError, run
from palign.train.metrics import say

RESULT = "result.json"


def run_study(config: StudyConfig, workdir: epath.Path, *, minutes: float = 0.0) -> list[Entry]:
    """Runs the jobs that have no result yet.

    Args:
        config: of the study.
        workdir: of the study.
        minutes: no job is begun that would end later, going by the longest one so far; 0 = all are run.

    Returns:
        The jobs that have a result, in the order of the study.

    Raises:
        ValueError: a job was run under another config before, or what `train.loop.run` raises.
    """
    bench, jobs, begin = Bench(config, workdir), list_jobs(config), time.monotonic()
    waiting = [job for job in jobs if not bench.is_finished(job)]
    say(f"study: {len(jobs)} jobs, {len(jobs) - len(waiting)} of them finished before")
    longest = 0.0
    for done, job in enumerate(waiting, start=1):
        started = time.monotonic()
        if minutes and started - begin + longest > 60 * minutes:
            left = len(waiting) - done + 1
            say(f"study: stopped after {_clock(started - begin)}; {left} jobs are left, the same command goes on")
            break
        run_job(bench, job)
        now, left = time.monotonic(), len(waiting) - done
        longest = max(longest, now - started)
        rest = f"{left} jobs left, about {_clock((now - begin) / done * left)}" if left else "all jobs are done"
        say(f"study: {job.name} took {_clock(now - started)}; {rest}")
    return [bench.entry(job) for job in jobs if bench.is_finished(job)]


@dataclasses.dataclass
class Bench:
    """Where a study's jobs, data and results lie, and what its runs are measured on."""

    config: StudyConfig
    workdir: epath.Path
    heldouts: dict[int, Heldout] = dataclasses.field(default_factory=dict)

    def place(self, job: Job) -> epath.Path:
        """The workdir of a job's run."""
        return self.workdir / job.name

    def source(self, seed: int, name: str) -> epath.Path:
        """The workdir of a run that others of this seed start from or read."""
        return self.place(middle_job(self.config, seed, name))

    def data(self, seed: int) -> epath.Path:
        """Where a seed's data lies."""
        return self.workdir / f"seed-{seed}" / "02-data"

    def run_config(self, job: Job) -> RunConfig:
        """The config of a job's run."""
        if job.method == SFT:
            return resolve_run(sft_config(self.config, job, str(self.data(job.seed) / "sft.jsonl")))
        path = data_path(self.config.methods[job.method], self.data(job.seed))
        return resolve_run(job_config(self.config, job, str(path)))

    def is_finished(self, job: Job) -> bool:
        """Whether a job has its result.

        Raises:
            ValueError: its run began under another config.
        """
        if not (self.place(job) / RESULT).is_file():
            return False
        check_same_config(self.run_config(job), self.place(job))
        return True

    def entry(self, job: Job) -> Entry:
        """A finished job with its result.

        Raises:
            ValueError: it was measured on another number of prompts than the study's.
        """
        facts = json.loads((self.place(job) / RESULT).read_text())
        found, expected = facts["result"], self.config.test_prompts
        if found and len(found["gold"]) != expected:
            raise ValueError(
                f"config.test_prompts = {expected}: {job.name} was measured on {len(found['gold'])}; take the old "
                "value back, or another --workdir"
            )
        return Entry(job, _result(found), facts["train_seconds"], facts["measure_seconds"])

    def heldout(self, seed: int) -> Heldout:
        """What a seed's runs are measured on, drawn when it is first needed."""
        if seed not in self.heldouts:
            self.heldouts[seed] = hold_out(self.config, self.source(seed, SFT), seed)
        return self.heldouts[seed]


def run_job(bench: Bench, job: Job) -> None:
    """Trains and measures a job, and writes its result; that a run diverges is a result too."""
    place, started, result = bench.place(job), time.monotonic(), None
    _write_data(bench, job)
    try:
        run(bench.run_config(job), place)
    except TrainingDivergedError as error:
        say(f"study: {job.name} diverged, and that is its result: {error}")
    trained = time.monotonic()
    if (place / FINISHED).is_file():
        result = _measure(bench, job)
    seconds = {"train_seconds": trained - started, "measure_seconds": time.monotonic() - trained}
    facts = {"method": job.method, "setting": dict(job.setting), "seed": job.seed, **seconds, "result": _plain(result)}
    temporary = place / f"{RESULT}.tmp"
    temporary.write_text(json.dumps(facts))
    temporary.replace(place / RESULT)  # a file under its name is whole
    for step in checkpoint_steps(place)[:-1]:  # those that were measured; other runs read the last one alone
        shutil.rmtree(place / FOLDER / str(step))


def _write_data(bench: Bench, job: Job) -> None:
    if job.method == SFT:
        write_corpus_of(bench.config, bench.data(job.seed), job.seed)
    else:
        sft = bench.source(job.seed, SFT)
        write_data(bench.config, bench.config.methods[job.method], bench.data(job.seed), sft, job.seed)


def _measure(bench: Bench, job: Job) -> Result:
    place, heldout, seed = bench.place(job), bench.heldout(job.seed), zlib.crc32(job.name.encode())
    if job.method == SFT:
        return measure(place, heldout, (), seed=seed)
    if job.method == REVERSE_DPO:
        return measure(place, heldout, checkpoint_steps(place), seed=seed, dpo=bench.source(job.seed, DPO))
    method = bench.config.methods[job.method]
    beta = {**method.hyper, **job.setting}["beta"] if method.loss == DPO else None
    return measure(place, heldout, checkpoint_steps(place), seed=seed, beta=beta)


def _plain(result: Result | None) -> dict[str, Any] | None:
    if result is None:
        return None
    rewards = {
        name: value and value._asdict() for name in ("rewards", "contrastive") for value in [getattr(result, name)]
    }
    return result._asdict() | {"curve": [point._asdict() for point in result.curve]} | rewards


def _result(plain: dict[str, Any] | None) -> Result | None:
    if plain is None:
        return None
    rewards = {name: Rewards(**plain[name]) if plain[name] else None for name in ("rewards", "contrastive")}
    curve = tuple(Point(**point) for point in plain["curve"])
    return Result(**plain | rewards | {"curve": curve, "gold": tuple(plain["gold"])})


def _clock(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"
