"""The study's data, made once for each seed: reviews of the grammar, and rankings of what the SFT model writes."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from palign.data import world
from palign.recipes.study_config import MethodConfig, StudyConfig
from palign.recipes.world_runs import best_and_worst, draw, golds, win_shares, write_corpus, write_once
from palign.train.annotate import annotate_run
from palign.train.metrics import Reporter, say
from palign.train.sources import load_run

BLOCK = 4  # samples of a prompt that are drawn together: longer lists begin with the shorter ones
SHIFTED = {"happy": 0.8, "calm": 0.8, "tired": 0.2, "grumpy": 0.2}  # share of thumbs-up behind prompts of this mood


def write_corpus_of(config: StudyConfig, place: epath.Path, seed: int) -> None:
    """Writes what SFT learns, once: reviews of the training prompts."""
    prompts, _ = world.split_prompts(seed=0)
    write_corpus(place / "sft.jsonl", np.random.default_rng(seed), prompts, steps=config.sft_steps)


def data_path(method: MethodConfig, place: epath.Path) -> epath.Path:
    """The file that a method trains on.

    `pairs-K` holds the best and the worst of K ranked samples of a prompt, `lists-K` all of them, each with the share
    of the others that it was preferred to. `thumbs` has one response a prompt: mostly a thumbs-up (the best of K)
    where the prompt's mood is good, mostly a thumbs-down (the worst) where it is bad. `pairs-K-ches` is the share of
    the pairs with the lowest length-normalised CHES score, `pairs-K-random` as many drawn by lot.
    """
    kind = {"reversed": "pairs", "best": "pairs"}.get(method.data, method.data)
    names = {"ches": f"pairs-{method.responses}-ches", "random": f"pairs-{method.responses}-random"}
    return place / f"{names.get(kind, f'{kind}-{method.responses}')}.jsonl"


def write_data(config: StudyConfig, method: MethodConfig, place: epath.Path, sft: epath.Path, seed: int) -> None:
    """Writes the file that a method trains on, and those that it is made of, where they are not there.

    Args:
        config: of the study.
        method: of the study.
        place: where this seed's data lies.
        sft: the workdir of this seed's SFT run.
        seed: of the study.
    """
    if data_path(method, place).is_file():
        return
    pairs, lists = (place / f"{kind}-{method.responses}.jsonl" for kind in ("pairs", "lists"))
    if not lists.is_file():
        ranked = _ranked_lists(config, place, sft, seed, method.responses)
        write_once(pairs, (best_and_worst(record) for record in ranked))
        write_once(lists, ranked)
    if method.data == "thumbs":
        write_once(data_path(method, place), _thumbs(_read(lists), seed))
    if method.data in ("ches", "random"):
        _filter(config, pairs, sft, seed)


def _ranked_lists(
    config: StudyConfig, place: epath.Path, sft: epath.Path, seed: int, responses: int
) -> list[dict[str, Any]]:
    blocks = [_read(_samples(config, place, sft, seed, block)) for block in range(-(-responses // BLOCK))]
    lists = []
    for rows in zip(*blocks, strict=True):
        texts, noisy = ([x for row in rows for x in row[key]][:responses] for key in ("responses", "noisy"))
        scores = win_shares(np.asarray([noisy]))[0]
        lists.append({"prompt": rows[0]["prompt"], "responses": texts, "scores": scores.tolist()})
    return lists


def _samples(config: StudyConfig, place: epath.Path, sft: epath.Path, seed: int, block: int) -> epath.Path:
    """Four samples of every prompt, with the noisy gold reward that a person orders them by."""
    path = place / f"samples-{block}.jsonl"
    if path.is_file():
        return path
    prompts = world.sample_prompts(np.random.default_rng(seed), config.prompts, world.split_prompts(seed=0)[0])
    with Reporter(f"seed {seed}: samples to rank", len(prompts)) as progress:
        drawn = draw(load_run(str(sft)), prompts, samples=BLOCK, seed=10 * seed + block, progress=progress)
    noisy = world.bradley_terry_ranking(np.random.default_rng([seed, block]), golds(prompts, drawn))
    write_once(
        path,
        (
            {"prompt": prompt, "responses": [s.text for s in row], "noisy": scores.tolist()}
            for prompt, row, scores in zip(prompts, drawn, noisy, strict=True)
        ),
    )
    return path


def _thumbs(lists: Iterable[Mapping[str, Any]], seed: int) -> Iterable[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    for record in lists:
        liked = bool(rng.random() < next(SHIFTED[word] for word in record["prompt"].split() if word in SHIFTED))
        pair = best_and_worst(record)
        yield {"prompt": pair["prompt"], "completion": pair["chosen" if liked else "rejected"], "label": liked}


def _filter(config: StudyConfig, pairs: epath.Path, sft: epath.Path, seed: int) -> None:
    kept, lot = (pairs.with_name(f"{pairs.stem}-{name}.jsonl") for name in ("ches", "random"))
    if not kept.is_file():
        wanted = f"ches_normalised:0:{config.ches_keep:g}"
        annotated = pairs.with_name(f"{pairs.stem}-annotated.jsonl")
        annotate_run(str(sft), pairs, annotated, keep_quantile=wanted, filtered=kept)
    records, count = _read(pairs), len(_read(kept))
    chosen = sorted(np.random.default_rng(seed).permutation(len(records))[:count].tolist())
    write_once(lot, [records[i] for i in chosen])
    say(f"{lot}: {count} of {len(records)} pairs by lot")


def _read(path: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
