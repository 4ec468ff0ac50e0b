"""The quick start: a small language model is trained, compared and improved on a CPU, without a download.

Stages: SFT on the embedded world's reviews; four samples a prompt from the SFT model, ranked by people who are right as
often as Bradley and Terry say; DPO, reverse DPO, LiPO-lambda and AlignDistil on those rankings; evaluation and report.
Everything is an ordinary run or file below the workdir, so a run that was stopped goes on where it was.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from palign.config.load import resolve_run
from palign.data import world
from palign.generate.texts import Generation, generate
from palign.recipes.quickstart_report import write
from palign.recipes.quickstart_scores import score_models
from palign.train.loop import run
from palign.train.metrics import Reporter, say
from palign.train.sources import Loaded, load_run

MAX_NEW_TOKENS = 28  # the longest review and its EOS, with a little room to ramble
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


def quickstart(workdir: pathlib.Path, size: Size = DEMO) -> pathlib.Path:
    """Runs all stages and writes the report.

    Returns:
        The page's path, `workdir/report.html`.
    """
    train_prompts, heldout = world.split_prompts(seed=0)
    rng = np.random.default_rng(0)
    places = {"sft": workdir / "01-sft"}
    _write_once(workdir / "data" / "sft.jsonl", _corpus(rng, train_prompts, 80 * size.sft_steps))
    run(resolve_run(sft_config(workdir, size)), places["sft"])
    sample_preferences(workdir, size, train_prompts)
    for number, (name, config) in enumerate(preference_configs(workdir, size).items(), start=3):
        places[name] = workdir / f"{number:02d}-{name}"
        run(resolve_run(config), places[name])
    compared = {name: places[name] for name in ("sft", *size.methods)}
    scores = score_models(workdir, compared, heldout[: size.heldout_prompts], MAX_NEW_TOKENS)
    return write(workdir, places, scores)


def base_config() -> dict[str, Any]:
    """What all stages share: a decoder of 0.3 million parameters over a vocabulary of words."""
    return {
        "model": {"num_layers": 3, "dim": 96, "num_heads": 4, "num_key_heads": 2, "hidden_dim": 256, "remat": False},
        "tokenizer": {"model_type": "word", "vocab_size": 128},
        # Every device takes its share of the rows.
        "data": {"max_length": 64, "row_length": 512, "rows_per_step": math.lcm(4, jax.device_count()), "block": 32},
        "optimizer": {"b2": 0.98, "schedule": "cosine_to_floor", "warmup_ratio": 0.05},
        "train": {"log_every": 5, "keep": 20},
    }


def sft_config(workdir: pathlib.Path, size: Size) -> dict[str, Any]:
    """SFT on reviews from the grammar."""
    return _merged(
        data={"path": str(workdir / "data" / "sft.jsonl"), "eval_fraction": 0.02},
        objective={"loss_type": ["sft"]},
        optimizer={"learning_rate": 4e-3, "weight_decay": 0.1},
        train={
            "max_steps": size.sft_steps,
            "eval_every": max(size.sft_steps // 8, 1),
            "checkpoint_every": size.sft_steps,
        },
    )


def preference_configs(workdir: pathlib.Path, size: Size) -> dict[str, dict[str, Any]]:
    """The runs that learn from the rankings, in order."""
    place = workdir / "02-sample"
    pairs, lists = ({"path": str(place / name), "eval_fraction": 0.1} for name in ("pairs.jsonl", "lists.jsonl"))

    def preference(steps: int, **more: Any) -> dict[str, Any]:
        train = {"max_steps": steps, "eval_every": max(steps // 6, 1), "checkpoint_every": max(steps // 6, 1)}
        return _merged(init_from="sft", train=train, **more)

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


def sample_preferences(workdir: pathlib.Path, size: Size, prompts: list[str]) -> None:
    """Draws responses from the SFT model and ranks them; writes `pairs.jsonl` and `lists.jsonl` once."""
    place = workdir / "02-sample"
    if (place / "lists.jsonl").is_file():
        say(f"{place}: finished before, left as it is")
        return
    rng = np.random.default_rng(1)
    chosen = world.sample_prompts(rng, size.prompts, prompts)
    drawn = draw(load_run(str(workdir / "01-sft")), chosen, samples=SAMPLES, seed=1, title="02-sample")
    gold = [[world.gold_reward(p, s.text.strip()) for s in row] for p, row in zip(chosen, drawn, strict=True)]
    noisy = world.bradley_terry_ranking(rng, np.asarray(gold))
    # LiPO's labels lie in [0, 1]: the share of the other responses that a response was preferred to.
    scores = (noisy[:, :, None] > noisy[:, None, :]).sum(axis=2) / (SAMPLES - 1)
    lists = [
        {"prompt": prompt, "responses": [s.text for s in row], "scores": ranked.tolist()}
        for prompt, row, ranked in zip(chosen, drawn, scores, strict=True)
    ]
    _write_once(place / "pairs.jsonl", (_pair(record) for record in lists))
    _write_once(place / "lists.jsonl", lists)


def draw(loaded: Loaded, prompts: list[str], *, samples: int, seed: int, title: str) -> list[list[Generation]]:
    """Samples at temperature 1, with progress."""
    with Reporter(title, len(prompts)) as progress:
        return generate(
            loaded.lm,
            loaded.params,
            loaded.tokenizer,
            prompts,
            samples=samples,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
            batch_size=128,
            progress=progress,
        )


def _corpus(rng: np.random.Generator, prompts: list[str], n: int) -> Iterable[Mapping[str, str]]:
    return ({"prompt": p, "completion": " " + r} for p, r in world.corpus(rng, n, prompts))


def _pair(record: Mapping[str, Any]) -> dict[str, str]:
    best, worst = (int(pick(record["scores"])) for pick in (np.argmax, np.argmin))
    return {"prompt": record["prompt"], "chosen": record["responses"][best], "rejected": record["responses"][worst]}


def _merged(**sections: Any) -> dict[str, Any]:
    base = base_config()
    return base | {k: base.get(k, {}) | v if isinstance(v, dict) else v for k, v in sections.items()}


def _write_once(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.rename(path)  # a file under its name is whole
