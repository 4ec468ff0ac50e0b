"""What a study consists of: methods with their settings, seeds, sizes; and the jobs that follow, in order."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from palign.config.schema import ModelConfig
from palign.objectives.base import REFERENCE
from palign.objectives.registry import REVERSE, TEACHER, find_method, needs_of
from palign.recipes.world_runs import MAX_NEW_TOKENS, MODEL, merged

RATE = "learning_rate"  # the setting that belongs to the optimizer; all others are hyper-parameters of the loss
SFT, DPO, REVERSE_DPO = "sft", "dpo", "reverse"  # the runs that others start from or read
SOURCES = {REFERENCE: SFT, TEACHER: DPO, REVERSE: REVERSE_DPO}
DATA = ("pairs", "reversed", "best", "lists", "thumbs", "ches", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A line of the study: a loss on some data, and the settings that are tried."""

    label: str  # in tables and pictures
    group: str = "methods"  # that share a picture
    loss: str  # a name in palign.objectives.registry.METHODS
    data: str = "pairs"  # see palign.recipes.study_data
    responses: int = 4  # K, samples of a prompt that were ranked
    rollout_every: int = 0  # steps between two draws from the policy; 0 = off-policy
    hyper: Mapping[str, float] = dataclasses.field(default_factory=dict)  # the same in all settings
    grid: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # odd numbers of values

    def __post_init__(self) -> None:
        """Checks names and the grid."""
        find_method(self.loss)
        if self.data not in DATA:
            raise ValueError(f"config.methods: data = {self.data!r} of {self.label}: expected one of {', '.join(DATA)}")
        if RATE not in self.grid:
            raise ValueError(f"config.methods: {self.label} has no {RATE} in its grid; give it one value or more")
        for name, values in self.grid.items():
            if len(values) % 2 == 0 or len(set(values)) < len(values):
                raise ValueError(
                    f"config.methods: {name} = {values} of {self.label}: expected an odd number of different values; "
                    "the middle one is what the others are measured from"
                )

    def settings(self) -> Iterator[dict[str, float]]:
        """The middle of the grid, then every other value of one setting with the others in the middle."""
        middle = {name: values[len(values) // 2] for name, values in self.grid.items()}
        yield middle
        for name, values in self.grid.items():
            yield from (middle | {name: value} for value in values if value != middle[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Everything that is trained and measured."""

    methods: Mapping[str, MethodConfig]  # name -> line; with `dpo`, which wins are counted against
    first: tuple[str, ...] = ()  # methods whose middle settings are run before all else
    seeds: tuple[int, ...] = (0, 1, 2)
    model: ModelConfig = MODEL
    sft_steps: int = 200
    sft_learning_rate: float = 4e-3
    prompts: int = 1536  # that preferences are collected on
    steps: int = 120  # of every method
    checkpoints: int = 8  # that the curves are drawn through
    test_prompts: int = 512
    tuning_prompts: int = 128  # others: for the curves and the choice of settings
    ches_keep: float = 0.5  # share of the pairs that the CHES filter keeps

    def __post_init__(self) -> None:
        """Checks what must be there and what must divide."""
        if DPO not in self.methods:
            raise ValueError(f"config.methods: has no {DPO!r}, which wins are counted against; add it")
        for name, method in self.methods.items():
            missing = [s for s in sorted(map(SOURCES.__getitem__, needs_of([method.loss]).frozen)) if s != SFT]
            if missing := [source for source in missing if source not in self.methods]:
                raise ValueError(f"config.methods.{name}: reads {' and '.join(missing)}, which are missing; add them")
        if unknown := [name for name in self.first if name not in self.methods]:
            raise ValueError(f"config.first: {', '.join(unknown)} not in config.methods")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"config.seeds = {self.seeds}: expected one seed or more, all different")
        for name in ("sft_steps", "prompts", "steps", "checkpoints", "test_prompts", "tuning_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.{name} = {getattr(self, name)}: expected 1 or more")
        if self.steps % self.checkpoints:
            raise ValueError(f"config.checkpoints = {self.checkpoints}: expected a divisor of steps = {self.steps}")
        if not 0 < self.ches_keep < 1:
            raise ValueError(f"config.ches_keep = {self.ches_keep}: expected a share between 0 and 1")


class Job(NamedTuple):
    """One run of one method, with one setting and one seed."""

    seed: int
    method: str
    setting: Mapping[str, float]
    folder: str

    @property
    def name(self) -> str:
        """Where it runs, below the study's workdir."""
        return f"seed-{self.seed}/{self.folder}"


def list_jobs(config: StudyConfig) -> list[Job]:
    """Every job in the order in which they are run, so that a study that is stopped early has whole results.

    The middle settings of the methods that come first, seed by seed; those of the others, method by method; then the
    other settings, method by method. What a run reads always stands before it.
    """
    sources = [name for name in (DPO, REVERSE_DPO) if name in config.methods]
    early = [*sources, *(name for name in config.first if name not in sources)]
    later = [name for name in config.methods if name not in early]
    jobs = []
    for seed in config.seeds:
        jobs += [middle_job(config, seed, name) for name in (SFT, *early)]
    jobs += [middle_job(config, seed, name) for name in later for seed in config.seeds]
    for name in [*early, *later]:
        _, *others = config.methods[name].settings()
        jobs += [Job(seed, name, x, _folder(config, name, x)) for x in others for seed in config.seeds]
    return jobs


def middle_job(config: StudyConfig, seed: int, name: str) -> Job:
    """A method's job with the middle of its grid, or the SFT run that all others start from."""
    if name == SFT:
        return Job(seed, SFT, {RATE: config.sft_learning_rate}, f"01-{SFT}")
    number = "03" if name in (DPO, REVERSE_DPO) else "04"
    return Job(seed, name, next(config.methods[name].settings()), f"{number}-{name}")


def _folder(config: StudyConfig, name: str, setting: Mapping[str, float]) -> str:
    """`05-dpo-beta-0.25`: the setting that differs from the middle."""
    middle = next(config.methods[name].settings())
    return "-".join(["05", name, *(f"{key}-{value:g}" for key, value in setting.items() if value != middle[key])])


def sft_config(config: StudyConfig, job: Job, path: str) -> dict[str, Any]:
    """SFT on reviews from the grammar, the same schedule for all seeds."""
    return _run(
        config,
        job,
        data={"path": path, "eval_fraction": 0.02},
        objective={"loss_type": [SFT]},
        optimizer={"weight_decay": 0.1},
        train={"max_steps": config.sft_steps, "eval_every": config.sft_steps, "checkpoint_every": config.sft_steps},
    )


def job_config(config: StudyConfig, job: Job, path: str) -> dict[str, Any]:
    """The settings of a job's run, an ordinary one.

    Args:
        config: of the study.
        job: not the SFT run.
        path: of its data.
    """
    method = config.methods[job.method]
    needs = needs_of([method.loss])
    reference = "live" if REFERENCE in needs.frozen else "cached" if needs.reference else "none"
    roles = sorted(needs.frozen | ({REFERENCE} if needs.reference else set()))
    hyper = {**method.hyper, **{name: value for name, value in job.setting.items() if name != RATE}}
    records = {"reversed": "reversed", "best": "best_response"}.get(method.data, "all")
    # What frozen models say of the data's responses is known before training, not what they say of the policy's own.
    teachers = "cached" if needs.frozen and not method.rollout_every else "live"
    rollout = {"rollout": {"every": method.rollout_every, "max_new_tokens": MAX_NEW_TOKENS}}
    return _run(
        config,
        job,
        init_from=SFT,
        **{f"{role}_from": SOURCES[role] for role in roles},
        data={"path": path, "records": records, "eval_fraction": 0.05},
        objective={"loss_type": [method.loss], "reference": reference, "teachers": teachers, **hyper},
        optimizer={},
        train={
            "max_steps": config.steps,
            "eval_every": config.steps,
            "checkpoint_every": config.steps // config.checkpoints,
        },
        **(rollout if method.rollout_every else {}),
    )


def _run(config: StudyConfig, job: Job, **sections: Any) -> dict[str, Any]:
    sections["data"]["seed"] = sections["train"]["seed"] = job.seed
    sections["optimizer"][RATE] = job.setting[RATE]
    return merged(model=dataclasses.asdict(config.model), **sections)
