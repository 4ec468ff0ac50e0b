"""What gives responses a score: a Python function, or a reward model."""

import functools
import hashlib
import importlib
import inspect
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from palign.data.records import Record, Text, number
from palign.data.tokenize import TokenTree, tokenize_record
from palign.data.tokenizers import Tokenizer
from palign.eval.per_target import per_row
from palign.eval.score import as_dataset
from palign.models.protocol import LanguageModel
from palign.objectives.base import values_at_ends
from palign.train.digest import digest
from palign.train.once import identity
from palign.train.sources import Loaded, load_run

ROWS = 8  # of a reward model's batch
SHORTEST_ROW = 128  # tokens; longer rows are doubled, so that few lengths are compiled


class Scorer(NamedTuple):
    """A score for every response.

    Attributes:
        score: of each record one finite number for each of its responses, higher is better.
        identity: tells it from every other scorer.
    """

    score: Callable[[Sequence[Record]], list[list[float]]]
    identity: str


def function_scorer(name: str) -> Scorer:
    """A Python function `(prompt, response) -> number`.

    It is given strings, or lists of messages `{"role": ..., "content": ...}` where the prompt is a conversation.

    Args:
        name: `module:function`, found as Python finds modules, and in the working directory.

    Raises:
        ValueError: there is no such function; when it scores, it raises an error or returns no finite number: the
            message says of which record.
    """
    function = _find_function(name)
    source = inspect.getsourcefile(inspect.unwrap(function))
    content = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest() if source else ""

    def one(record: Record, k: int) -> float:
        where = f"response {k + 1}, by --scorer={name}"
        try:
            value = function(as_plain(record.prompt), as_plain(record.responses[k]))
        except Exception as error:  # whatever a user's function raises
            raise ValueError(f"{record.where}: {where}: {type(error).__name__}: {error}") from error
        value = value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and value.size == 1 else value
        return number(value, f"the score of {where},", record.where)

    def score(records: Sequence[Record]) -> list[list[float]]:
        return [[one(record, k) for k in range(len(record.responses))] for record in records]

    return Scorer(score, f"{name} {content[:16]}")


def reward_scorer(name: str, mesh: Mesh) -> Scorer:
    """The value head of a reward model, at the last token of each response.

    Nothing is cut: rows are as long as the longest record needs. Names of control tokens in messages are read as text.

    Args:
        name: the workdir of a run whose model has one value (`@STEP`, `@last` or `@best` behind it), or the directory
            of a Hugging Face model for sequence classification with one label.
        mesh: the devices.

    Raises:
        ValueError: no such model, or it has not one value; when it scores, a conversation that its template refuses.
    """
    loaded = load_run(name, mesh=mesh)
    if loaded.config.model.value_head != 1:
        raise ValueError(
            f"--reward_model={name}: its model has {loaded.config.model.value_head or 'no'} values; expected one, a "
            "reward: a run with config.model.value_head = 1, or a *ForSequenceClassification of one label"
        )

    def score(records: Sequence[Record]) -> list[list[float]]:
        trees = [_tokenise(record, loaded.tokenizer) for record in records]
        return rewards(loaded, trees, mesh)

    return Scorer(score, identity_of(loaded))


def identity_of(model: Loaded) -> str:
    """Tells a model with its tokenizer and chat template from every other one."""
    parts = (model.lm.settings, digest(model.params), identity(model.tokenizer))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def rewards(model: Loaded, trees: Sequence[TokenTree], mesh: Mesh) -> list[list[float]]:
    """What a value head says at the end of every response.

    Args:
        model: with a value head of one number.
        trees: records as the model's tokenizer reads them.
        mesh: the devices.

    Returns:
        For each tree a number for each of its responses.
    """
    longest = max(tree.prompt.size + sum(response.size for response in tree.responses) for tree in trees)
    row_length = SHORTEST_ROW
    while row_length < longest:
        row_length *= 2
    dataset = as_dataset(trees, row_length=row_length, rows_per_step=ROWS)
    found: dict[int, list[float]] = {}
    for values, row, members in per_row(dataset, _reward(model.lm), model.params, mesh):
        for example, member in enumerate(members):
            found[int(member)] = values[example][row.valid[example]].tolist()
    return [found[i] for i in range(len(trees))]


@functools.cache
def _reward(lm: LanguageModel) -> Callable:
    def reward(params, batch):
        return values_at_ends(lm, params, lm.hidden(params, batch), batch)[..., 0]

    return reward


def _tokenise(record: Record, tokenizer: Tokenizer) -> TokenTree:
    tree = tokenize_record(record, tokenizer, control_text="escape")
    if not tree.prompt.size:
        raise ValueError(f"{record.where}: the responses differ from the first token on, and there is no BOS before it")
    return tree


def _find_function(name: str) -> Callable[[Any, Any], Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--scorer={name}: expected module:function, such as judges:length")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(f"--scorer={name}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"--scorer={name}: the module {module} has no function {attribute!r}")
    return found


def as_plain(text: Text) -> str | list[dict[str, str]]:
    """A text as data files hold it."""
    return text if isinstance(text, str) else [turn._asdict() for turn in text]
