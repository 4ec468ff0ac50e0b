"""Ranked lists: K responses to every prompt, given or sampled, with a score each.

The work is kept in parts, each in a file once it is done, so that a run that was killed goes on. The input, the
settings and the seed decide the result, however often it was stopped.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from palign.data.formats import PROMPT_ONLY
from palign.data.readers import read_records
from palign.data.records import Message, Record, Text
from palign.generate.texts import generate
from palign.sharding.mesh import make_mesh
from palign.train.lock import run_lock
from palign.train.metrics import Reporter, counted, say
from palign.train.paths import absolute, write_lines
from palign.train.scorers import Scorer, as_plain, function_scorer, identity_of, reward_scorer
from palign.train.sources import load_run

SETTINGS = "settings.json"


class Sampling(NamedTuple):
    """How responses are drawn from a model, see `palign.generate.texts.generate`."""

    samples: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Responder(NamedTuple):
    """What answers prompts.

    Attributes:
        respond: (prompts, the first one's number) -> of each prompt its usable responses, and what was counted.
        identity: tells it from every other one.
    """

    respond: Callable[[Sequence[Text], int], tuple[list[tuple[Text, ...]], Counter[str]]]
    identity: str


def label(
    path: epath.PathLike,
    out: epath.PathLike,
    *,
    scorer: str = "",
    reward_model: str = "",
    responses_from: str = "",
    sampling: Sampling = Sampling(),  # noqa: B008
    batch_size: int = 16,
) -> Counter[str]:
    """Writes `prompt`, `responses`, `scores` for every prompt of a data set.

    Responses that are alike are scored once and written once. Sampled ones that are blank, or that hold characters no
    data file may, are left out; a prompt that is left without any is too.

    Args:
        path: the data, see `palign.data.readers.read_records`.
        out: `.jsonl`; while it is made, its parts lie in `OUT.parts`.
        scorer: `module:function`, see `function_scorer`; this or `reward_model`.
        reward_model: a workdir, or a Hugging Face model's directory, see `reward_scorer`.
        responses_from: a workdir, or a Hugging Face model's directory, from which responses are sampled; "": those of
            the data are scored.
        sampling: how.
        batch_size: prompts at a time; what is done again after a kill is at most as much.

    Returns:
        What was counted: `prompts`, `responses`, `alike`, and of sampled ones `blank`, `unusable`, `unfinished`.

    Raises:
        ValueError: bad data, no such model or function, a score that is no number, or parts of other settings.
    """
    if bool(scorer) == bool(reward_model):
        raise ValueError("give --scorer=module:function or --reward_model=DIR: one of them scores")
    if batch_size < 1:
        raise ValueError(f"--batch_size={batch_size}: expected 1 or more")
    place = _check_out(path, out)
    records = _read(path, sampled=bool(responses_from))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    judge = function_scorer(scorer) if scorer else reward_scorer(reward_model, mesh)
    responder = sampler(responses_from, sampling, batch_size) if responses_from else None
    settings = {
        "input": hashlib.sha256(repr([record[:2] for record in records]).encode()).hexdigest(),
        "scorer" if scorer else "reward_model": judge.identity,
        "responses_from": responder.identity if responder else "",
        "batch_size": batch_size,
        **(sampling._asdict() if responder else {}),
    }
    parts = place.parent / f"{place.name}.parts"
    with run_lock(parts):
        _check_settings(parts, settings)
        counts = _label_parts(parts, records, judge, responder, batch_size)
        write_lines(place, _finished_lines(parts, len(records), batch_size))
    parts.rmtree()
    say(f"{place}: {counted(counts)}")
    return counts


def sampler(name: str, sampling: Sampling, batch_size: int) -> Responder:
    """A model that responses are drawn from.

    Args:
        name: a run's workdir (`@STEP`, `@last` or `@best` behind it) or a Hugging Face model's directory.
        sampling: how.
        batch_size: prompts at a time.
    """
    loaded = load_run(name)
    settings = sampling._asdict()
    seed = settings.pop("seed")

    def respond(prompts: Sequence[Text], first: int) -> tuple[list[tuple[Text, ...]], Counter[str]]:
        own_seed = int(np.random.SeedSequence([seed, first]).generate_state(1)[0])
        drawn = generate(
            loaded.lm, loaded.params, loaded.tokenizer, prompts, seed=own_seed, batch_size=batch_size, **settings
        )
        flat = [sample for samples in drawn for sample in samples]
        counts = Counter(
            blank=sum(not sample.text.strip() for sample in flat),
            unusable=sum("\0" in sample.text for sample in flat),
            unfinished=sum(not sample.finished for sample in flat),
        )
        texts = [[s.text for s in samples if s.text.strip() and "\0" not in s.text] for samples in drawn]
        return [_as_responses(prompt, kept) for prompt, kept in zip(prompts, texts, strict=True)], counts

    return Responder(respond, identity_of(loaded))


def _as_responses(prompt: Text, texts: Sequence[str]) -> tuple[Text, ...]:
    return tuple(texts) if isinstance(prompt, str) else tuple((Message("assistant", text),) for text in texts)


def _check_out(path: epath.PathLike, out: epath.PathLike) -> epath.Path:
    place = epath.Path(out)
    if place.suffix != ".jsonl":
        raise ValueError(f"--output={out}: expected a file named *.jsonl")
    if absolute(place) == absolute(path):
        raise ValueError(f"--output={out}: is what is read; name another file")
    if place.exists():
        raise ValueError(f"--output={out}: is there already; remove it, or name another file")
    return place


def _read(path: epath.PathLike, *, sampled: bool) -> list[Record]:
    records, counts = read_records(path)
    say(f"{path}: {counted(counts)}")
    if not sampled and any(name.startswith(f"format/{PROMPT_ONLY.name}") for name in counts):
        raise ValueError(f"{path}: has prompts alone; name the model that answers them by --responses_from=DIR")
    if blank := next((record for record in records if not record.prompt), None):
        raise ValueError(f"{blank.where}: a text without a prompt; lists are of responses to one prompt")
    return records


def _check_settings(parts: epath.Path, settings: dict[str, Any]) -> None:
    """Begins parts where there are none yet, or goes on with those of the same settings."""
    file = parts / SETTINGS
    if not any(parts.glob("*.jsonl")):
        write_lines(file, [json.dumps(settings, indent=1).encode()])
        return
    before = json.loads(file.read_text())
    for name in (before | settings).keys():
        if before.get(name) != settings.get(name):
            shown = f" ({before.get(name)!r} then, {settings.get(name)!r} now)" if name in Sampling._fields else ""
            raise ValueError(
                f"{parts}: was begun with another {name}{shown}; take the old one back, or remove the directory to "
                "begin anew"
            )


def _part(parts: epath.Path, first: int) -> epath.Path:
    return parts / f"{first:09d}.jsonl"


def _label_parts(
    parts: epath.Path, records: Sequence[Record], judge: Scorer, responder: Responder | None, batch_size: int
) -> Counter[str]:
    """Makes the parts that are missing, each a line of counts and a line for each prompt, and adds up the counts."""
    starts = range(0, len(records), batch_size)
    missing = [first for first in starts if not _part(parts, first).is_file()]
    if len(missing) < len(starts):
        say(f"{parts}: goes on, {len(starts) - len(missing)} of {len(starts)} parts are there")
    done = len(records) - sum(min(batch_size, len(records) - first) for first in missing)
    with Reporter("label", len(records), start=done, unit="responses/s") as progress:
        for first in missing:
            batch = records[first : first + batch_size]
            rows, counts = _label_batch(batch, first, judge, responder)
            write_lines(
                _part(parts, first), (json.dumps(line, ensure_ascii=False).encode() for line in [counts, *rows])
            )
            done += len(batch)
            progress.advance(done, counts["responses"])
    total = Counter[str]()
    for first in starts:
        total.update(json.loads(next(_lines(_part(parts, first)))))
    return total


def _label_batch(
    batch: Sequence[Record], first: int, judge: Scorer, responder: Responder | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    counts = Counter[str]()
    responses = [record.responses for record in batch]
    if responder:
        responses, counts = responder.respond([record.prompt for record in batch], first)
    kept = [tuple(dict.fromkeys(texts)) for texts in responses]
    answered = [
        record._replace(responses=texts, scores=(0.0,) * len(texts))
        for record, texts in zip(batch, kept, strict=True)
        if texts
    ]
    scores = judge.score(answered) if answered else []
    rows = [
        {
            "prompt": as_plain(record.prompt),
            "responses": [as_plain(text) for text in record.responses],
            "scores": numbers,
        }
        for record, numbers in zip(answered, scores, strict=True)
    ]
    tied = sum(len(set(numbers)) == 1 for numbers in scores)
    alike = sum(map(len, responses)) - sum(map(len, kept))
    made = Counter(prompts=len(rows), responses=sum(map(len, kept)), without_a_preference=tied, alike=alike)
    made["unanswered"] = len(batch) - len(rows)
    return rows, made + counts


def _lines(file: epath.Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        for line in opened:
            yield line.rstrip(b"\n")


def _finished_lines(parts: epath.Path, records: int, batch_size: int) -> Iterator[bytes]:
    for first in range(0, records, batch_size):
        lines = _lines(_part(parts, first))
        next(lines)  # its counts
        yield from lines
