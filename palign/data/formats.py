"""What the columns of a row mean. A format is told by its columns; `FORMATS` is the whole table."""

import bisect
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from palign.data.records import RecordError, number, short, wrong_type
from palign.data.strict_json import Row

ASSISTANT = "\n\nAssistant:"


class Fields(NamedTuple):
    """What a format's converter takes out of a row, not checked yet.

    Attributes:
        prompt: a string or a list of messages.
        responses: of the same kind, each.
        scores: a number for each response, or its ratings by attribute, which `Format.weights` adds up.
    """

    prompt: Any
    responses: Any
    scores: Any


class Format(NamedTuple):
    """A kind of rows.

    Attributes:
        name: for the log.
        columns: all of them must be there.
        convert: (row, "file:line") -> fields, or None for a comparison that ended in a tie.
        extra: further columns that are read, or that repeat what is read.
        weights: of the ratings by attribute, where responses are rated so; `config.data.score_weights` replaces them.
        one_response: rows hold one rated response each, and those of one prompt become one list.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row, str], Fields | None]
    extra: tuple[str, ...] = ()
    weights: Mapping[str, float] = {}
    one_response: bool = False


def _from_pair(row: Row, where: str) -> Fields | None:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _behind_question(prompt, chosen, rejected, where)
    return _compared(prompt, chosen, rejected, row, where)


def _from_implicit_pair(row: Row, where: str) -> Fields | None:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        end = _shared_text(chosen, rejected, where)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        end = _shared_messages(chosen, rejected, where)
    else:
        return Fields("", [chosen, rejected], [1.0, 0.0])  # make_record says what is wrong
    return _compared(chosen[:end], chosen[end:], rejected[end:], row, where)


def _from_tunix(row: Row, where: str) -> Fields:
    return Fields(row["prompts"], [row["chosen_responses"], row["rejected_responses"]], [1.0, 0.0])


def _from_scored_list(row: Row, where: str) -> Fields:
    return Fields(row["prompt"], row["responses"], row["scores"])


def _from_ranked_list(row: Row, where: str) -> Fields:
    ranks = row["rank" if "rank" in row else "ranks"]
    return Fields(row["prompt"], row["responses"], _scores(ranks, where) if isinstance(ranks, list) else ranks)


def _from_nectar(row: Row, where: str) -> Fields:
    answers = _objects(row, "answers", ("answer", "rank"), where)
    return Fields(row["prompt"], [a["answer"] for a in answers], _scores([a["rank"] for a in answers], where))


def _from_nemo(row: Row, where: str) -> Fields:
    completions = _objects(row, "completions", ("completion", "rank"), where)
    responses = [_answer(row["context"], c["completion"]) for c in completions]
    return Fields(row["context"], responses, _scores([c["rank"] for c in completions], where))


def _from_helpsteer2(row: Row, where: str) -> Fields:
    return Fields(row["prompt"], [row["response"]], [{name: row[name] for name in HELPSTEER2}])


def _from_helpsteer3(row: Row, where: str) -> Fields | None:
    preference = number(row["overall_preference"], "overall_preference", where)  # below 0: the first is better
    responses = [_answer(row["context"], row[name]) for name in ("response1", "response2")]
    return Fields(row["context"], responses, [max(-preference, 0.0), max(preference, 0.0)]) if preference else None


def _from_ultrafeedback(row: Row, where: str) -> Fields:
    completions = _objects(row, "completions", ("response",), where)
    ratings = [_ultrafeedback_ratings(completion) for completion in completions]
    return Fields(row["instruction"], [completion["response"] for completion in completions], ratings)


def _from_labelled(row: Row, where: str) -> Fields:
    label = row["label"]
    if not (isinstance(label, bool) or label in (0, 1)) or isinstance(label, float):
        raise RecordError("label", f"{where}: label is {str(label)[:60]!r}; expected true or false")
    return Fields(row["prompt"], [row["completion"]], [1.0 if label else -1.0])


def _from_completion(row: Row, where: str) -> Fields:
    return Fields(row["prompt"], [row["completion"]], [0.0])


def _from_messages(row: Row, where: str) -> Fields:
    messages = row["messages"]
    if not isinstance(messages, list):
        raise wrong_type(messages, "messages", "a list", where)
    first = next((n for n in range(len(messages)) if _role(messages, n) == "assistant"), None)
    if first is None:
        raise RecordError("no_response", f"{where}: messages has no turn of the assistant; expected one to learn from")
    return Fields(messages[:first], [messages[first:]], [0.0])


def _from_prompt(row: Row, where: str) -> Fields:
    """With an empty response, whose place a sample takes."""
    return Fields(row["prompt"], [_answer(row["prompt"], "")], [0.0])


def _from_text(row: Row, where: str) -> Fields:
    return Fields("", [row["text"]], [0.0])


# Wang et al., HelpSteer2 (arXiv 2406.08673): the weights of its 70B reward model.
HELPSTEER2 = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4}
GRADED_PAIR = ("score_chosen", "score_rejected", "margin", "messages")

PROMPT_ONLY = Format("prompt only", ("prompt",), _from_prompt)
FORMATS = (
    Format("preference", ("prompt", "chosen", "rejected"), _from_pair, GRADED_PAIR),
    Format("preference with an implicit prompt", ("chosen", "rejected"), _from_implicit_pair, GRADED_PAIR),
    Format("scored list", ("prompt", "responses", "scores"), _from_scored_list),  # higher is better
    Format("ranked list", ("prompt", "responses", "rank"), _from_ranked_list),  # lower is better
    Format("ranked list", ("prompt", "responses", "ranks"), _from_ranked_list),
    Format("unpaired", ("prompt", "completion", "label"), _from_labelled),
    Format("completion", ("prompt", "completion"), _from_completion),
    Format("messages", ("messages",), _from_messages),
    Format("text", ("text",), _from_text),
    PROMPT_ONLY,
    Format("tunix", ("prompts", "chosen_responses", "rejected_responses"), _from_tunix),
    Format("Nectar", ("prompt", "answers"), _from_nectar),
    Format("NeMo", ("context", "completions"), _from_nemo),
    Format("UltraFeedback", ("instruction", "completions"), _from_ultrafeedback, weights={"overall_score": 1.0}),
    Format("HelpSteer2", ("prompt", "response", *HELPSTEER2), _from_helpsteer2, (), HELPSTEER2, one_response=True),
    Format("HelpSteer3", ("context", "response1", "response2", "overall_preference"), _from_helpsteer3),
)

NO_MEDIA = "only text is read: remove these records, or the column"
NO_IDS = "the texts are tokenised here: give those and remove the column"
NO_LOGPS = "config.objective.reference = 'cached' computes and keeps them: remove the column"
# Columns of other libraries that would change what is trained, where they hold anything -> what to do.
REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio"), NO_MEDIA),
    **dict.fromkeys(("tools", "chat_template_kwargs"), "templates get messages alone: remove the column"),
    **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "input_ids"), NO_IDS),
    **dict.fromkeys(("completion_mask", "assistant_masks"), NO_IDS),
    **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"), NO_LOGPS),
}


def find_format(columns: frozenset[str], where: str) -> Format:
    """Returns the format that a row with these columns has.

    Args:
        columns: the row's column names.
        where: "file:line".

    Returns:
        The format that uses the most of the columns.

    Raises:
        RecordError: if no format fits, with the nearest one, or if two fit and neither covers the other.
    """
    fitting = [f for f in FORMATS if columns.issuperset(f.columns)]
    if PROMPT_ONLY in fitting and (len(fitting) > 1 or _resembles_others(columns)):
        fitting.remove(PROMPT_ONLY)
    widest = [f for f in fitting if not any(set(f.columns) < {*g.columns, *g.extra} for g in fitting if g is not f)]
    if len(widest) == 1:
        return widest[0]
    shown = ", ".join(map(short, sorted(columns)[:12])) or "none"
    if widest:
        both = " and ".join("+".join(f.columns) for f in widest)
        advice = "remove the columns of one of them"
        raise RecordError("columns", f"{where}: columns {shown} fit two formats, {both}; {advice}")
    nearest = max(
        (f.columns for f in FORMATS if f != PROMPT_ONLY), key=lambda names: (_likeness(names, columns), -len(names))
    )
    accepted = ", ".join("+".join(f.columns) for f in FORMATS)
    found = f"columns found: {shown}; formats accepted: {accepted}"
    if not _likeness(nearest, columns):
        raise RecordError("columns", f"{where}: {found}; rename or join the columns to one of these")
    missing = [name for name in nearest if name not in columns]
    hints = [(name, difflib.get_close_matches(name, columns, 1)) for name in missing]
    renames = [f"rename {close[0]!r} to {name!r}" for name, close in hints if close]
    advice = "; ".join(renames) or f"add {', '.join(map(repr, missing))}"
    raise RecordError("columns", f"{where}: {found}; the nearest is {'+'.join(nearest)}: {advice}")


def weigh(ratings: Any, weights: Mapping[str, float], name: str, where: str) -> float:
    """Returns the score that ratings by attribute add up to.

    Args:
        ratings: attribute -> number.
        weights: attribute -> weight; others count nothing.
        name: whose ratings they are, for the message.
        where: "file:line".

    Raises:
        RecordError: an attribute is missing or no number.
    """
    if missing := [attribute for attribute in weights if attribute not in ratings]:
        there = ", ".join(map(short, ratings)) or "none"
        found = f"{name} has no rating {missing[0]!r}; there are: {there}"
        raise RecordError("rating", f"{where}: {found}: name those in config.data.score_weights")
    return sum(
        weight * number(ratings[attribute], f"{attribute} of {name}", where) for attribute, weight in weights.items()
    )


def _compared(prompt: Any, chosen: Any, rejected: Any, row: Row, where: str) -> Fields | None:
    """The pair with the scores that its row has for it."""
    scores = [1.0, 0.0]
    if "score_chosen" in row or "score_rejected" in row:
        scores = [number(row.get(name), name, where) for name in ("score_chosen", "score_rejected")]
    elif "margin" in row:
        scores = [number(row["margin"], "margin", where), 0.0]
    if scores[0] < scores[1]:
        found = f"chosen has a lower score than rejected ({scores[0]:g} < {scores[1]:g})"
        raise RecordError("contradiction", f"{where}: {found}; swap them or remove the record")
    return Fields(prompt, [chosen, rejected], scores) if scores[0] > scores[1] else None


def _behind_question(prompt: str, chosen: list, rejected: list, where: str) -> tuple[list, list, list]:
    """Splits conversations that have their first question as text beside them (binarized UltraFeedback)."""
    if _role(chosen, 0) == "assistant":
        return [{"role": "user", "content": prompt}], chosen, rejected
    end = _shared_messages(chosen, rejected, where)
    if not any(isinstance(turn, dict) and turn.get("content") == prompt for turn in chosen[:end]):
        found = "the prompt is none of the messages that chosen and rejected share"
        raise RecordError("no_common_prompt", f"{where}: {found}; remove the column 'prompt', or the record")
    return chosen[:end], chosen[end:], rejected[end:]


def _shared_text(one: str, other: str, where: str) -> int:
    """Where the prompt of two texts ends: at the last shared turn of a dialogue, else at the last shared word."""
    lengths = range(min(len(one), len(other)) + 1)
    same = bisect.bisect_left(lengths, True, key=lambda n: one[:n] != other[:n]) - 1
    if ASSISTANT in one or ASSISTANT in other:
        start = one.rfind(ASSISTANT, 0, same)
        if start >= 0:
            return start + len(ASSISTANT)
        found = f"share no turn that begins with {ASSISTANT!r}"
    else:
        while same and not one[same - 1].isspace():
            same -= 1
        end = len(one[:same].rstrip())  # the space belongs to the response
        if end:
            return end
        found = "share no first word"
    raise RecordError(
        "no_common_prompt",
        f"{where}: chosen and rejected {found}, so their prompt cannot be told; expected the same beginning, such as "
        "'\\n\\nHuman: ...\\n\\nAssistant: ...' dialogues of one history: else add a 'prompt' column",
    )


def _shared_messages(one: Sequence[Any], other: Sequence[Any], where: str) -> int:
    """How many messages of two conversations are the prompt: all before the last shared turn of the assistant."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    while same >= 0 and not (_role(one, same) == _role(other, same) == "assistant"):
        same -= 1
    if same < 1:
        found = "chosen and rejected share no message before a turn of the assistant"
        raise RecordError("no_common_prompt", f"{where}: {found}; expected conversations of one beginning")
    return same


def _objects(row: Row, column: str, keys: Collection[str], where: str) -> list[Row]:
    """A column's list of objects, which all have these keys."""
    items = row[column]
    if not isinstance(items, list):
        raise wrong_type(items, column, "a list of objects", where)
    for n, item in enumerate(items, 1):
        if not isinstance(item, dict) or not item.keys() >= set(keys):
            raise wrong_type(item, f"{column}, item {n}", f"an object with {' and '.join(keys)}", where)
    return items


def _scores(ranks: Sequence[Any], where: str) -> list[float]:
    return [-number(rank, f"rank {k}", where) for k, rank in enumerate(ranks, 1)]


def _answer(prompt: Any, response: Any) -> Any:
    """A response as messages where the prompt is a conversation."""
    wrapped = isinstance(prompt, list) and isinstance(response, str)
    return [{"role": "assistant", "content": response}] if wrapped else response


def _role(messages: Sequence[Any], n: int) -> Any:
    """The role of a message; None where there is no such message."""
    return messages[n].get("role") if n < len(messages) and isinstance(messages[n], dict) else None


def _ultrafeedback_ratings(completion: Row) -> Row:
    """Attribute -> rating: the two overall scores, and the rating of each aspect, which the files hold as text."""
    ratings: Row = {name: completion[name] for name in ("overall_score", "fine-grained_score") if name in completion}
    aspects = completion.get("annotations")
    for aspect, annotation in aspects.items() if isinstance(aspects, dict) else ():
        rating = annotation.get("Rating") if isinstance(annotation, dict) else None
        ratings[aspect] = int(rating) if isinstance(rating, str) and rating.isdecimal() else rating
    return ratings


def _resembles_others(columns: frozenset[str]) -> bool:
    """Whether a column besides the prompt is one of some format, perhaps misspelt."""
    known = {name for f in FORMATS for name in f.columns} - {"prompt"}
    return any(difflib.get_close_matches(name, known, 1, cutoff=0.85) for name in columns - {"prompt"})


def _likeness(names: tuple[str, ...], columns: frozenset[str]) -> float:
    """Returns how much of a format the columns cover, near misses counting half."""
    score = sum(1.0 if n in columns else 0.5 * bool(difflib.get_close_matches(n, columns, 1)) for n in names)
    return score / len(names)
