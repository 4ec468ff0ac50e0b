"""Every format, on rows written here in the manner of the real sets."""

import json
import pathlib
import re

import pytest

from palign.data import formats, readers, records, strict_json
from palign.data.formats import FORMATS, REFUSED, find_format
from palign.data.readers import read_records
from tests.data.samples import write_rows

TURN = "\n\nHuman: x\n\nAssistant:"


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def read(tmp_path, *rows, **settings):
    return read_records(write_rows(tmp_path / "d.jsonl", *rows), **settings)


def said(text):
    """A conversation as pairs of role and content."""
    return text if isinstance(text, str) else [tuple(message) for message in text]


Q, A, B, C = ("user", "q"), ("assistant", "a"), ("assistant", "b"), ("assistant", "c")
RATINGS = {"helpfulness": 4, "correctness": 3, "coherence": 4, "complexity": 2, "verbosity": 1}
ASPECTS = {"helpfulness": {"Rating": "5", "Rationale": "."}, "honesty": {"Rating": "3", "Rationale": "."}}
COMPLETIONS = [
    {"model": "m", "response": "a", "overall_score": 7.5, "fine-grained_score": 4.0, "annotations": ASPECTS},
    {"model": "n", "response": "b", "overall_score": 6.0, "fine-grained_score": 4.5, "annotations": ASPECTS},
]

# What is read -> format, prompt, responses, scores.
READ = {
    "TRL: a pair": (
        {"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", "q", ["a", "b"], (1, 0),
    ),
    "TRL: a pair of conversations": (
        {"prompt": [user("q")], "chosen": [answer("a")], "rejected": [answer("b")]},
        "preference in messages", [Q], [[A], [B]], (1, 0),
    ),
    "TRL: a margin": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2.5}, "preference", "q", ["a", "b"], (2.5, 0),
    ),
    "TRL: an implicit prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "preference with an implicit prompt", "The sky is", [" blue.", " black."], (1, 0),
    ),
    "TRL: an implicit prompt of a conversation": (
        {"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]},
        "preference with an implicit prompt in messages", [Q], [[A], [B]], (1, 0),
    ),
    "TRL: unpaired": ({"prompt": "q", "completion": "a", "label": True}, "unpaired", "q", ["a"], (1,)),
    "TRL: unpaired, unwanted": ({"prompt": "q", "completion": "a", "label": 0}, "unpaired", "q", ["a"], (-1,)),
    "TRL: unpaired in messages": (
        {"prompt": [user("q")], "completion": [answer("a")], "label": False},
        "unpaired in messages", [Q], [[A]], (-1,),
    ),
    "TRL: prompt only": ({"prompt": "q", "source": "s"}, "prompt only", "q", [""], (0,)),
    "TRL: prompt only in messages": (
        {"prompt": [user("q")], "prompt_id": 3}, "prompt only in messages", [Q], [[("assistant", "")]], (0,),
    ),
    "TRL: completion": ({"prompt": "q", "completion": "a"}, "completion", "q", ["a"], (0,)),
    "TRL: text": ({"text": "t"}, "text", "", ["t"], (0,)),
    "TRL: messages": (
        {"messages": [{"role": "system", "content": "s"}, user("q"), answer("a"), user("q"), answer("b")]},
        "messages in messages", [("system", "s"), Q], [[A, Q, B]], (0,),
    ),
    "messages beside their first question": (
        {"prompt": "q", "prompt_id": "x", "messages": [user("q"), answer("a")]},
        "messages in messages", [Q], [[A]], (0,),
    ),
    "a table's nulls": (
        {"messages": [user("q") | {"name": None}, answer("a", tool_calls=None)], "tools": None},
        "messages in messages", [Q], [[A]], (0,),
    ),
    "HH": (
        {"chosen": TURN + " yes", "rejected": TURN + " no"},
        "preference with an implicit prompt", TURN, [" yes", " no"], (1, 0),
    ),
    "UltraFeedback": (
        {"source": "s", "instruction": "q", "models": ["m", "n"], "completions": COMPLETIONS},
        "UltraFeedback", "q", ["a", "b"], (7.5, 6),
    ),
    "UltraFeedback, binarized": (
        {
            "prompt": "q", "prompt_id": "x", "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")],
            "messages": [user("q"), answer("a")], "score_chosen": 8.0, "score_rejected": 6.5,
        },
        "preference in messages", [Q], [[A], [B]], (8, 6.5),
    ),
    "a question beside answers alone": (
        {"prompt": "q", "chosen": [answer("a")], "rejected": [answer("b")]},
        "preference in messages", [Q], [[A], [B]], (1, 0),
    ),
    "HelpSteer2": (
        {"prompt": "q", "response": "a", **RATINGS},
        "HelpSteer2", "q", ["a"], (4 * 0.65 + 3 * 0.8 + 4 * 0.45 + 2 * 0.55 - 0.4,),
    ),
    "HelpSteer3, the first": (
        {"domain": "d", "context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -2},
        "HelpSteer3 in messages", [Q], [[A], [B]], (2, 0),
    ),
    "HelpSteer3, the second": (
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 1},
        "HelpSteer3 in messages", [Q], [[A], [B]], (0, 1),
    ),
    "Nectar": (
        {
            "prompt": TURN + " ", "turns": 1, "num_responses": 2, "source": ["s"], "good_natured": True,
            "answers": [{"answer": "a", "model": "m", "rank": 2.0}, {"answer": "b", "model": "n", "rank": 1.0}],
        },
        "Nectar", TURN + " ", ["a", "b"], (-2, -1),
    ),
    "NeMo": (
        {
            "context": [user("q")],
            "completions": [
                {"rank": 0, "completion": [answer("a")]}, {"rank": 1, "completion": [answer("b")]},
                {"rank": 1, "completion": "c"},
            ],
        },
        "NeMo in messages", [Q], [[A], [B], [C]], (0, -1, -1),
    ),
    "tunix": (
        {"prompts": "q", "chosen_responses": "a", "rejected_responses": "b"}, "tunix", "q", ["a", "b"], (1, 0),
    ),
    "palign: scores": (
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0, 2.5, 2.5]},
        "scored list", "q", ["a", "b", "c"], (0, 2.5, 2.5),
    ),
    "palign: scores of conversations": (
        {"prompt": [user("q")], "responses": [[answer("a")], [answer("b")]], "scores": [1, 2]},
        "scored list in messages", [Q], [[A], [B]], (1, 2),
    ),
    "palign: rank": (
        {"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]}, "ranked list", "q", ["a", "b"], (-1, -2),
    ),
    "palign: ranks": (
        {"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]}, "ranked list", "q", ["a", "b"], (-2, -1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_each_format_is_told_by_its_columns_and_named(tmp_path, name):
    row, format, prompt, responses, scores = READ[name]
    (record,), counts = read(tmp_path, row)
    assert said(record.prompt) == prompt
    assert [said(response) for response in record.responses] == responses
    assert record.scores == pytest.approx(scores)
    assert counts[f"format/{format}"] == 1 and sum(name.startswith("format/") for name in counts) == 1


def test_every_format_has_a_row_here():
    found = {find_format(frozenset(row), "f:1").name for row, *_ in READ.values()}
    assert found == {format.name for format in FORMATS}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (TURN + " yes", TURN + " yes and", TURN),  # one is a prefix of the other
        (TURN, TURN + " no", TURN),  # an answer that ends at once
        (TURN + " a" + TURN + " yes", TURN + " a" + TURN + " no", TURN + " a" + TURN),  # two turns
        (TURN + " a" + TURN + " yes", TURN + " b" + TURN + " yes", TURN),  # they part in the first turn
        ("one two", "one two three", "one"),  # one is a prefix of the other
        ("one\n two", "one\n three", "one"),
        ("a  b", "a  c", "a"),
    ],
)
def test_the_implicit_prompt_of_texts_ends_with_a_whole_turn_or_word(tmp_path, chosen, rejected, prompt):
    (record,), _ = read(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert record.prompt == prompt
    assert tuple(prompt + response for response in record.responses) == (chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "length"),
    [
        ([Q, A, Q, B], [Q, A, Q, C], 3),  # two turns
        ([Q, A, Q, B], [Q, B, Q, B], 1),  # they part in the first turn
        ([Q, A, ("user", "r"), B], [Q, A, ("user", "s"), B], 1),  # the user goes on in another way
        ([Q, A], [Q, A, Q, B], 1),  # one is a prefix of the other
    ],
)
def test_the_implicit_prompt_of_conversations_ends_before_a_turn_of_the_assistant(tmp_path, chosen, rejected, length):
    row = {"chosen": chosen, "rejected": rejected}
    row = {name: [{"role": role, "content": text} for role, text in turns] for name, turns in row.items()}
    (record,), _ = read(tmp_path, row)
    assert said(record.prompt) == chosen[:length]
    assert [said(record.prompt + response) for response in record.responses] == [chosen, rejected]


def test_comparisons_that_ended_in_a_tie_are_dropped_and_counted(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    scored = {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0}
    rows = [pair | {"score_chosen": 5, "score_rejected": 5}, pair | {"margin": 0}, scored, pair]
    found, counts = read(tmp_path, *rows)
    assert [record.id for record in found] == [3] and counts["ties"] == 3 and counts["rows"] == 4


def test_the_weights_of_ratings_can_be_replaced(tmp_path):
    row = READ["UltraFeedback"][0]
    (record,), _ = read(tmp_path, row, score_weights={"helpfulness": 0.5, "honesty": 0.25, "fine-grained_score": 1.0})
    assert record.scores == (0.5 * 5 + 0.25 * 3 + 4.0, 0.5 * 5 + 0.25 * 3 + 4.5)
    with pytest.raises(ValueError, match=r"d.jsonl:1: response 1 has no rating 'tact'; there are: overall_score, fine"):
        read(tmp_path, row, score_weights={"tact": 1.0})


@pytest.mark.parametrize("column", sorted(REFUSED))
def test_columns_that_would_change_the_training_are_refused_unless_they_are_empty(tmp_path, column):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=f"column '{column}' cannot be honoured; .* the column"):
        read(tmp_path, pair | {column: [1]})
    _, counts = read(tmp_path, pair | {column: []})
    assert counts[f"ignored_column/{column}"] == 1
    with pytest.raises(ValueError, match=f"column '{column}'"):  # what is wrong comes before what is missing
        read(tmp_path, {column: [1]})


def test_the_page_lists_every_format_and_every_reason():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for format in FORMATS:
        assert ", ".join(f"`{name}`" for name in format.columns) in page, format.name
    files = (pathlib.Path(module.__file__) for module in (formats, readers, records, strict_json))
    reasons = {reason for file in files for reason in re.findall(r'RecordError\(\s*"(\w+)"', file.read_text())}
    assert len(reasons) > 20 and not {reason for reason in reasons if f"`{reason}`" not in page}


def test_rows_of_several_formats_share_a_file(tmp_path):
    rows = [row for row, *_ in READ.values()]
    found, counts = read(tmp_path, *rows)
    assert len(found) == len(rows) and sum(n for name, n in counts.items() if name.startswith("format/")) == len(rows)
    assert json.dumps(counts)
