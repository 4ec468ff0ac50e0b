"""From a config to what a run works on: tokenizer, data sets, model size. What is cut or dropped is counted."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from palign.config.schema import DataConfig, RunConfig
from palign.data.loader import Dataset
from palign.data.pack import RowShape, row_shape
from palign.data.plan import fill_ratio, fit_trees, plan_epochs, plan_evaluation, plan_padded, row_needs
from palign.data.readers import read_records
from palign.data.records import Message, Record, Text, best_response
from palign.data.tokenize import TokenTree, add_mismatched, tokenize_records
from palign.data.tokenizers import Tokenizer, load_tokenizer, read_chat_template, train_sentencepiece
from palign.objectives.registry import find_method
from palign.sharding.processes import is_main, wait_for_all
from palign.train.metrics import say
from palign.train.sources import CONFIG

HELD_OUT = "heldout"


class Prepared(NamedTuple):
    """What a run works on."""

    tokenizer: Tokenizer
    train: Dataset
    evals: dict[str, Dataset]


def _all(record: Record) -> Record:
    return record


def _reversed(record: Record) -> Record:
    return record._replace(scores=tuple(-score for score in record.scores))


# What a stage trains on, from each record: `config.data.records`.
RECORDS: dict[str, Callable[[Record], Record]] = {
    "all": _all,
    "best_response": best_response,
    "reversed": _reversed,  # the worse is preferred: reverse DPO
}


def prepare(config: RunConfig, workdir: epath.Path, inherited: epath.Path | None) -> Prepared:
    """Reads, splits, tokenises, fits and plans the data of a run, and prints the counts.

    Args:
        config: of the run.
        workdir: where the tokenizer is kept.
        inherited: the workdir whose tokenizer is used where the config names none (of `init_from`, say).

    Raises:
        ValueError: no data, bad data, or examples that do not fit a row.
    """
    data = config.data
    if not data.path:
        raise ValueError("config.data.path: must be set to a .jsonl or .jsonl.gz file of prompts and responses")
    sets = read_sets(data)
    if config.rollout.every:
        sets["train"] = [_without_response(record) for record in sets["train"]]
    tokenizer = _prepare_tokenizer(config, workdir, inherited, sets["train"])
    room = config.rollout.max_new_tokens if config.rollout.every else 1
    lengths = {name: data.max_length - (room - 1 if name == "train" else 0) for name in sets}
    trees = {name: _tokenise(name, records, tokenizer, lengths[name], data) for name, records in sets.items()}
    if config.rollout.every:
        trees["train"] = [reserve_room(tree, room) for tree in trees["train"]]
    if any(find_method(name).mismatched for name in config.objective.loss_type):
        trees = {name: _mismatch(name, part, data) for name, part in trees.items()}
    responses = max(len(tree.responses) for part in trees.values() for tree in part)
    shape = row_shape(
        data.row_length,
        trees=1 if data.packing == "one_per_row" else data.trees_per_row,
        responses=responses,
        pair_policy=data.pair_policy,
        block=data.block,
    )
    made = {name: _plan(name, part, shape, config) for name, part in trees.items()}
    return Prepared(tokenizer, made.pop("train"), made)


def read_sets(data: DataConfig) -> dict[str, list[Record]]:
    """Reads `train` and the named held-out sets; records that share a prompt are never on both sides."""
    records = _read(data.path, data)
    held_out = {id(r) for r in records if _share(r.prompt, data.seed) < data.eval_fraction}
    sets = {"train": [r for r in records if id(r) not in held_out]}
    if held_out:
        sets[HELD_OUT] = [r for r in records if id(r) in held_out]
    for name, path in data.eval_paths.items():
        sets[name] = _read(path, data)
    for name, part in sets.items():
        if not part:
            raise ValueError(f"config.data: the set {name!r} has no records; give it more data or another fraction")
    return sets


def _read(path: str, data: DataConfig) -> list[Record]:
    records, counts = read_records(path, limit=data.limit or None)
    say(f"{path}: {_counted(counts | {'records': len(records)})}")
    return [RECORDS[data.records](record) for record in records]


def _share(prompt: Text, seed: int) -> float:
    """A number in [0, 1) that depends on the prompt and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8], "big") / 2**64


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
) -> list[TokenTree]:
    trees, counts = tokenize_records(records, tokenizer, max_length=max_length, **tokenization_of(data))
    counts["without_a_preference"] = sum(len(tree.scores) > 1 and not has_preference(tree) for tree in trees)
    say(f"{name}: {_counted(counts)}")
    if not trees:
        raise ValueError(
            f"config.data: no record of {name!r} is left that fits {max_length} tokens; raise config.data.max_length"
        )
    return trees


def reserve_room(tree: TokenTree, tokens: int) -> TokenTree:
    """The tree with one response of so many tokens, to be planned now and replaced by a sample of at most as many."""
    return tree._replace(responses=(np.zeros(tokens, np.int32),), scores=(0.0,), learned=None)


def _mismatch(name: str, trees: list[TokenTree], data: DataConfig) -> list[TokenTree]:
    try:
        trees, counts = add_mismatched(trees, max_length=data.max_length)
    except ValueError as error:
        raise ValueError(f"config.data ({name}): {error}") from None
    say(f"{name}: one response to another prompt added to each, {_counted(counts)}")
    return trees


def has_preference(tree: TokenTree) -> bool:
    """Whether an example compares anything: two responses of different scores."""
    return max(tree.scores) > min(tree.scores)


def _plan(name: str, trees: list[TokenTree], shape: RowShape, config: RunConfig) -> Dataset:
    data, train = config.data, config.train
    try:
        trees, counts = fit_trees(trees, shape, layout=data.layout, oversize=data.oversize, seed=data.seed)
    except ValueError as error:
        raise ValueError(f"config.data.row_length, config.data.oversize ({name}): {error}") from None
    needs = row_needs(trees, layout=data.layout, pair_policy=data.pair_policy)
    length = {"max_steps": train.max_steps} if train.max_steps else {"epochs": train.epochs}
    if name != "train":
        plan = plan_evaluation(needs, shape, rows_per_step=data.rows_per_step)
    elif data.packing == "one_per_row":
        plan = plan_padded(len(trees), examples_per_step=data.rows_per_step, seed=data.seed, **length)
    else:
        plan = plan_epochs(needs, shape, rows_per_step=data.rows_per_step, seed=data.seed, **length)
    fill = fill_ratio(plan, needs, shape)
    planned = f"{plan.num_steps} steps of {data.rows_per_step} rows, {fill:.0%} full"
    say(f"{name}: {', '.join(filter(None, [planned, _counted(counts)]))}")
    return Dataset(trees, shape, plan, data.pair_policy, data.layout, data.seed)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Sets the model's vocabulary to the tokenizer's.

    Raises:
        ValueError: the config names a smaller one.
    """
    size = config.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ValueError(
            f"config.model.vocab_size = {size}: the tokenizer has {tokenizer.vocab_size} ids; use 0 for as many"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
