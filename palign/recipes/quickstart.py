"""The quick start: a small language model is trained, compared and improved on a CPU, without a download.

Stages: SFT on the embedded world's reviews; four samples a prompt from the SFT model, ranked by people who are right as
often as Bradley and Terry say; DPO, reverse DPO, LiPO-lambda and AlignDistil on those rankings; evaluation and report.
Everything is an ordinary run or file below the workdir, so a run that was stopped goes on where it was.
"""

from typing import Any, NamedTuple

import numpy as np
from etils import epath

from palign.config.load import resolve_run
from palign.data import world
from palign.recipes.quickstart_report import write
from palign.recipes.quickstart_scores import score_models
from palign.recipes.world_runs import best_and_worst, draw, golds, merged, win_shares, write_corpus, write_once
from palign.train.loop import run
from palign.train.metrics import Reporter, say
from palign.train.sources import load_run

SAMPLES = 4


class Size(NamedTuple):
    """How much work the quick start does."""

    sft_steps: int
    prompts: int  # that preferences are collected on
    preference_steps: int
    distillation_steps: int
    heldout_prompts: int
    methods: tuple[str, ...]  # compared in the table; reverse DPO only serves AlignDistil


DEMO = Size(200, 1536, 150, 120, 512, ("dpo", "lipo", "aligndistil"))
FULL = Size(400, 1536, 400, 300, 768, ("dpo", "ipo", "lipo", "aligndistil"))
SMOKE = Size(4, 16, 4, 4, 16, ("dpo", "lipo", "aligndistil"))


def quickstart(workdir: epath.Path, size: Size = DEMO) -> epath.Path:
    """Runs all stages and writes the report.

    Returns:
        The page's path, `workdir/report.html`.
    """
    train_prompts, heldout = world.split_prompts(seed=0)
    rng = np.random.default_rng(0)
    places = {"sft": workdir / "01-sft"}
    write_corpus(workdir / "data" / "sft.jsonl", rng, train_prompts, steps=size.sft_steps)
    run(resolve_run(sft_config(workdir, size)), places["sft"])
    sample_preferences(workdir, size, train_prompts)
    for number, (name, config) in enumerate(preference_configs(workdir, size).items(), start=3):
        places[name] = workdir / f"{number:02d}-{name}"
        run(resolve_run(config), places[name])
    compared = {name: places[name] for name in ("sft", *size.methods)}
    scores = score_models(workdir, compared, heldout[: size.heldout_prompts])
    return write(workdir, places, scores)


def sft_config(workdir: epath.Path, size: Size) -> dict[str, Any]:
    """SFT on reviews from the grammar."""
    return merged(
        data={"path": str(workdir / "data" / "sft.jsonl"), "eval_fraction": 0.02},
        objective={"loss_type": ["sft"]},
        optimizer={"learning_rate": 4e-3, "weight_decay": 0.1},
        train={
            "max_steps": size.sft_steps,
            "eval_every": max(size.sft_steps // 8, 1),
            "checkpoint_every": size.sft_steps,
        },
    )


def preference_configs(workdir: epath.Path, size: Size) -> dict[str, dict[str, Any]]:
    """The runs that learn from the rankings, in order."""
    place = workdir / "02-sample"
    pairs, lists = ({"path": str(place / name), "eval_fraction": 0.1} for name in ("pairs.jsonl", "lists.jsonl"))

    def preference(steps: int, **more: Any) -> dict[str, Any]:
        train = {"max_steps": steps, "eval_every": max(steps // 6, 1), "checkpoint_every": max(steps // 6, 1)}
        return merged(init_from="sft", train=train, **more)

    def against_sft(loss: str, data: dict[str, Any], rate: float, **hyper: float) -> dict[str, Any]:
        objective = {"loss_type": [loss], "reference": "cached", **hyper}
        optimizer = {"learning_rate": rate}
        return preference(
            size.preference_steps, reference_from="sft", data=data, objective=objective, optimizer=optimizer
        )

    distilled = {"loss_type": ["aligndistil"], "beta0": 0.5, "scale": 1.0}
    configs = {
        "dpo": against_sft("dpo", pairs, 1e-3, beta=0.5),
        "reverse": against_sft("dpo", pairs | {"records": "reversed"}, 1e-3, beta=0.5),
        "ipo": against_sft("ipo", pairs, 1e-3, beta=0.5),
        "lipo": against_sft("lipo_lambda", lists, 1e-3, beta=0.5),
        "aligndistil": preference(
            size.distillation_steps,
            teacher_from="dpo",
            reverse_from="reverse",
            data=pairs | {"records": "best_response"},
            objective=distilled,
            optimizer={"learning_rate": 1e-3, "b2": 0.95},
        ),
    }
    return {name: config for name, config in configs.items() if name in (*size.methods, "reverse")}


def sample_preferences(workdir: epath.Path, size: Size, prompts: list[str]) -> None:
    """Draws responses from the SFT model and ranks them; writes `pairs.jsonl` and `lists.jsonl` once."""
    place = workdir / "02-sample"
    if (place / "lists.jsonl").is_file():
        say(f"{place}: finished before, left as it is")
        return
    rng = np.random.default_rng(1)
    chosen = world.sample_prompts(rng, size.prompts, prompts)
    with Reporter("02-sample", len(chosen)) as progress:
        drawn = draw(load_run(str(workdir / "01-sft")), chosen, samples=SAMPLES, seed=1, progress=progress)
    scores = win_shares(world.bradley_terry_ranking(rng, golds(chosen, drawn)))
    lists = [
        {"prompt": prompt, "responses": [s.text for s in row], "scores": ranked.tolist()}
        for prompt, row, ranked in zip(chosen, drawn, scores, strict=True)
    ]
    write_once(place / "pairs.jsonl", (best_and_worst(record) for record in lists))
    write_once(place / "lists.jsonl", lists)
