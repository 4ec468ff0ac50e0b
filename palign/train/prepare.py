"""From a config to what a run works on: tokenizer, data sets, model size. What is cut or dropped is counted."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from palign.config.schema import DataConfig, RunConfig
from palign.data.formats import PROMPT_ONLY
from palign.data.grouping import group_pairs
from palign.data.loader import Dataset
from palign.data.mixture import Mixture
from palign.data.pack import RowShape, row_shape
from palign.data.plan import Order, fill_ratio, fit_trees, plan_epochs, plan_evaluation, plan_padded, row_needs
from palign.data.readers import read_records
from palign.data.records import Message, Record, Text, best_response
from palign.data.stored import TreeSize, tree_sizes
from palign.data.tokenize import TokenTree, add_mismatched, tokenize_records
from palign.data.tokenizers import Tokenizer, load_tokenizer, read_chat_template, train_sentencepiece
from palign.objectives.registry import find_method
from palign.sharding.processes import is_main, wait_for_all
from palign.train.metrics import Reporter, counted, say
from palign.train.once import TOKENIZER, Tokenised, check_tokenizer, is_prepared, load_tokenised
from palign.train.sources import CONFIG

HELD_OUT = "heldout"


class Prepared(NamedTuple):
    """What a run works on."""

    tokenizer: Tokenizer
    train: Dataset
    evals: dict[str, Dataset]
    counts: Mapping[str, int]  # of everything that was read, see `read_records`


def _each(change: Callable[[Record], Record]) -> Callable[[Sequence[Record]], tuple[list[Record], dict[str, int]]]:
    return lambda records: (list(map(change, records)), {})


def _reversed(record: Record) -> Record:
    return record._replace(scores=tuple(-score for score in record.scores))


# What a stage trains on, of the records that were read: `config.data.records`. What it changed is counted.
RECORDS: dict[str, Callable[[Sequence[Record]], tuple[list[Record], dict[str, int]]]] = {
    "all": _each(lambda record: record),
    "best_response": _each(best_response),
    "reversed": _each(_reversed),  # the worse is preferred: reverse DPO
    "grouped": group_pairs,
}


def prepare(config: RunConfig, workdir: epath.Path, inherited: epath.Path | None) -> Prepared:
    """Reads, splits, tokenises, fits and plans the data of a run, and prints the counts.

    Data that were prepared once (`train.once`) are not read: what is known of them is checked and printed.

    Args:
        config: of the run.
        workdir: where the tokenizer is kept.
        inherited: the workdir whose tokenizer is used where the config names none (of `init_from`, say).

    Raises:
        ValueError: no data, bad data, or examples that do not fit a row.
    """
    if is_prepared(config.data.path):
        place = epath.Path(config.data.path)
        config, stored = load_tokenised(config)
        tokenizer = _prepare_tokenizer(config, workdir, inherited or place / TOKENIZER, ())
        check_tokenizer(place, stored.tokenizer, tokenizer)
        return plan_all(config, stored._replace(tokenizer=tokenizer))
    return plan_all(config, tokenise(config, workdir, inherited))


def tokenise(config: RunConfig, workdir: epath.Path, inherited: epath.Path | None) -> Tokenised:
    """Reads, splits and tokenises the data of a run, and prints the counts; arguments and errors as `prepare`."""
    sets, read = read_all(config.data)
    return tokenise_sets(config, sets, read, workdir, inherited)


def tokenise_sets(
    config: RunConfig,
    sets: Mapping[str, Sequence[Record]],
    read: Mapping[str, int],
    workdir: epath.Path,
    inherited: epath.Path | None,
) -> Tokenised:
    """Tokenises what `read_all` gave; the other arguments and errors as `prepare`."""
    data = config.data
    _check_responses(config, read)
    if config.rollout.every:
        sets = {**sets, "train": [_without_response(record) for record in sets["train"]]}
    tokenizer = _prepare_tokenizer(config, workdir, inherited, sets["train"])
    trees, counts = {}, {}
    for name, records in sets.items():
        max_length = data.max_length - (_room(config) - 1 if name == "train" else 0)
        trees[name], counts[name] = _tokenise(name, records, tokenizer, max_length, data)
    source_of = {record.id: record.source for record in sets["train"]}
    return Tokenised(tokenizer, trees, [source_of[tree.id] for tree in trees["train"]], read, counts)


def _room(config: RunConfig) -> int:
    """Tokens that a response may take at least."""
    return config.rollout.max_new_tokens if config.rollout.every else 1


def plan_all(config: RunConfig, tokenised: Tokenised) -> Prepared:
    """Fits and plans tokenised sets, and prints how full the rows are; errors as `prepare`."""
    data, trees = config.data, dict(tokenised.trees)
    if config.rollout.every:
        trees["train"] = [reserve_room(tree, _room(config)) for tree in trees["train"]]
    if any(find_method(name).mismatched for name in config.objective.loss_type):
        trees = {name: _mismatch(name, part, data) for name, part in trees.items()}
    responses = max(len(size.responses) for part in trees.values() for size in tree_sizes(part))
    shape = row_shape(
        data.row_length,
        trees=1 if data.packing == "one_per_row" else data.trees_per_row,
        responses=responses,
        pair_policy=data.pair_policy,
        block=data.block,
    )
    made = {name: _plan(name, part, shape, config, tokenised.sources) for name, part in trees.items()}
    return Prepared(tokenised.tokenizer, made.pop("train"), made, tokenised.read)


def _check_responses(config: RunConfig, counts: Mapping[str, int]) -> None:
    alone = sum(counts.get(f"format/{PROMPT_ONLY.name}{kind}", 0) for kind in ("", " in messages"))
    if alone and not config.rollout.every:
        raise ValueError(
            f"{data_key(config.data)}: {alone:,} rows are prompts alone, and only a run that samples "
            "(config.rollout.every above 0) learns from those; add responses"
        )


def data_key(data: DataConfig) -> str:
    """The setting that says where the training data is, for messages."""
    return f"config.data.mixture = {dict(data.mixture)!r}" if data.mixture else f"config.data.path = {data.path!r}"


def read_sets(data: DataConfig) -> dict[str, list[Record]]:
    """Reads `train` and the named held-out sets; records that share a prompt are never on both sides.

    Raises:
        ValueError: no data, bad data, or a set without records.
    """
    return read_all(data)[0]


def read_all(data: DataConfig) -> tuple[dict[str, list[Record]], Counter[str]]:
    """Reads the sets as `read_sets`, and what was counted in all of their sources."""
    if not (data.path or data.mixture):
        raise ValueError("config.data.path: must be set to a file of prompts and responses, or config.data.mixture")
    records: list[Record] = []
    total = Counter[str]()
    for source, path in enumerate(data.mixture or [data.path]):
        part, counts = _read(path, data, first_id=total["rows"])
        records += [record._replace(source=source) for record in part]
        total.update(counts)
    held_out = {id(r) for r in records if _share(r, data.seed) < data.eval_fraction}
    sets = {"train": [r for r in records if id(r) not in held_out]}
    if held_out:
        sets[HELD_OUT] = [r for r in records if id(r) in held_out]
    for name, path in data.eval_paths.items():
        sets[name], counts = _read(path, data)
        total.update(counts)
        _say_what_leaks(name, sets)
    for name, part in sets.items():
        if not part:
            raise ValueError(f"config.data: the set {name!r} has no records; give it more data or another fraction")
    return sets, total


def _read(path: str, data: DataConfig, first_id: int = 0) -> tuple[list[Record], dict[str, int]]:
    records, counts = read_records(
        path,
        limit=data.limit or None,
        bad_records=data.bad_records,
        score_weights=data.score_weights,
        first_id=first_id,
    )
    records, changed = RECORDS[data.records](records)
    say(f"{path}: {counted(counts | changed)}")
    return records, counts | changed


def _say_what_leaks(name: str, sets: Mapping[str, Sequence[Record]]) -> None:
    trained = {record.prompt for record in sets["train"]}
    if shared := sum(record.prompt in trained for record in sets[name]):
        say(f"{name}: {shared:,} of {len(sets[name]):,} records have a prompt that is trained on")


def _mix(data: DataConfig, sources: Sequence[int]) -> Order:
    try:
        mixture = Mixture(sources, list(data.mixture.values()), data.seed)
    except ValueError as error:
        raise ValueError(f"config.data.mixture, of {', '.join(data.mixture)}: {error}") from None
    for path, count, size in zip(data.mixture, mixture.counts, mixture.sizes, strict=True):
        say(f"train: {count:,} examples of an epoch are from {path}, which has {size:,}")
    return mixture.order


def _share(record: Record, seed: int) -> float:
    """A number in [0, 1) that depends on the prompt, or where there is none on the responses, and on the seed alone."""
    text = record.prompt or record.responses
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:8], "big") / 2**64


def _prepare_tokenizer(config, workdir, inherited, records: Sequence[Record]) -> Tokenizer:
    """The run's tokenizer, kept in its workdir by process 0 and read there by the others."""
    if is_main() and not (workdir / CONFIG).is_file():  # else the run was begun and has one
        tokenizer = _find_tokenizer(config, inherited, records)
        if config.tokenizer.chat_template:
            tokenizer.chat_template = read_chat_template(config.tokenizer.chat_template)
        tokenizer.save(workdir)
    wait_for_all("tokenizer")
    return load_tokenizer(workdir)


def _find_tokenizer(config, inherited, records: Sequence[Record]) -> Tokenizer:
    if place := config.tokenizer.path or inherited:
        return load_tokenizer(place)
    texts = [text for record in records for response in record.responses for text in _texts(record.prompt, response)]
    c = config.tokenizer
    tokenizer = train_sentencepiece(texts, vocab_size=c.vocab_size, model_type=c.model_type)
    say(f"tokenizer: trained a {c.model_type} model of {tokenizer.vocab_size} pieces on {len(texts)} texts")
    return tokenizer


def _texts(prompt: Text, response: Text) -> list[str]:
    """What a tokenizer is trained on: the two as one text, or what the messages say."""
    if isinstance(prompt, str) and isinstance(response, str):
        return [prompt + response]
    return [turn if isinstance(turn, str) else turn.content for turn in (*prompt, *response)]


def _without_response(record: Record) -> Record:
    """The record with one empty response, whose place a sample takes."""
    response: Text = "" if isinstance(record.prompt, str) else (Message("assistant", ""),)
    return record._replace(responses=(response,), scores=(0.0,))


def tokenization_of(data: DataConfig) -> dict[str, Any]:
    """How `tokenize_records` is to treat a run's records, but for `max_length`."""
    names = ("max_prompt_length", "truncation", "control_text", "bad_records")
    return {name: getattr(data, name) for name in names}


def _tokenise(
    name: str, records: Sequence[Record], tokenizer: Tokenizer, max_length: int, data: DataConfig
) -> tuple[list[TokenTree], dict[str, int]]:
    with Reporter(f"tokenising {name}", len(records)) as progress:
        trees, counts = tokenize_records(
            records, tokenizer, max_length=max_length, **tokenization_of(data), advance=progress.advance
        )
    counts["without_a_preference"] = sum(len(tree.scores) > 1 and not has_preference(tree) for tree in trees)
    say(f"{name}: {counted(counts)}")
    if not trees:
        raise ValueError(
            f"config.data: no record of {name!r} is left that fits {max_length} tokens; raise config.data.max_length"
        )
    return trees, counts


def reserve_room(tree: TokenTree, tokens: int) -> TokenTree:
    """The tree with one response of so many tokens, to be planned now and replaced by a sample of at most as many."""
    return tree._replace(responses=(np.zeros(tokens, np.int32),), scores=(0.0,), learned=None)


def _mismatch(name: str, trees: Sequence[TokenTree], data: DataConfig) -> list[TokenTree]:
    try:
        added, counts = add_mismatched(list(trees), max_length=data.max_length)
    except ValueError as error:
        raise ValueError(f"config.data ({name}): {error}") from None
    say(f"{name}: one response to another prompt added to each, {counted(counts)}")
    return added


def has_preference(tree: TokenTree | TreeSize) -> bool:
    """Whether an example compares anything: two responses of different scores."""
    return max(tree.scores) > min(tree.scores)


def _plan(name: str, trees: Sequence[TokenTree], shape: RowShape, config: RunConfig, sources: Sequence[int]) -> Dataset:
    data, train = config.data, config.train
    try:
        trees, counts = fit_trees(trees, shape, layout=data.layout, oversize=data.oversize, seed=data.seed)
    except ValueError as error:
        raise ValueError(f"config.data.row_length, config.data.oversize ({name}): {error}") from None
    needs = row_needs(trees, layout=data.layout, pair_policy=data.pair_policy)
    length = {"max_steps": train.max_steps} if train.max_steps else {"epochs": train.epochs}
    order = _mix(data, sources) if name == "train" and data.mixture else None
    if name != "train":
        plan = plan_evaluation(needs, shape, rows_per_step=data.rows_per_step)
    elif data.packing == "one_per_row":
        plan = plan_padded(len(trees), examples_per_step=data.rows_per_step, seed=data.seed, order=order, **length)
    else:
        plan = plan_epochs(needs, shape, rows_per_step=data.rows_per_step, seed=data.seed, order=order, **length)
    fill = fill_ratio(plan, needs, shape)
    planned = f"{plan.num_steps} steps of {data.rows_per_step} rows, {fill:.0%} full"
    say(f"{name}: {', '.join(filter(None, [planned, counted(counts)]))}")
    return Dataset(trees, shape, plan, data.pair_policy, data.layout, data.seed)


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Sets the model's vocabulary to the tokenizer's.

    Raises:
        ValueError: the config names a smaller one.
    """
    size = config.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ValueError(
            f"config.model.vocab_size = {size}: the tokenizer has {tokenizer.vocab_size} ids, and each needs a row of "
            "the embedding; use 0 for a new model, enlarge one that you have by transformers' resize_token_embeddings"
        )
    if size > tokenizer.vocab_size:
        say(f"the model has {size:,} ids, of which the tokenizer uses {tokenizer.vocab_size:,}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
