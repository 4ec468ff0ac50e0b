"""Each way in which a record or a file can be bad: one line with its place, or skipped and counted by reason."""

import gzip
import json

import pytest

from palign.data import strict_json
from palign.data.readers import read_records
from tests.data.samples import write_rows

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
SCORED = b'{"prompt": "q", "responses": ["a"], "scores": '


def talk(*roles):
    return [{"role": role, "content": "x"} for role in roles]


def said(**columns):
    return json.dumps(columns).encode()


# One line of a file -> why it is skipped, and a part of the message.
RECORDS = {
    "malformed JSON": (b'{"prompt": "q" "chosen": "a"}', "not_json", "not JSON at column 16"),
    "cut off": (b'{"prompt": "q", "chosen": "a", "reje', "not_json", "not JSON at column"),
    "two objects on a line": (b'{"text": "a"} {"text": "b"}', "not_json", "expected one whole object on each line"),
    "a raw NUL": (b'{"text": "a\x00"}', "not_json", "not JSON at column"),
    "a byte of another encoding": (b'{"text": "\xe9"}', "not_utf8", "byte 0xe9 at 10 is not UTF-8"),
    "a byte-order mark": (b"\xef\xbb\xbf{}", "byte_order_mark", "begins with a byte-order mark; save the file as"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "byte_order_mark", "byte-order mark"),
    "UTF-16 without a mark": ('{"text": "a"}'.encode("utf-16-le"), "not_json", "not JSON at column 2"),
    "an escaped NUL": (said(text="a\0"), "nul", "response 1 holds NUL at character 1; remove it"),
    "half of a surrogate pair": (
        b'{"prompt": "q", "chosen": "\\ud800", "rejected": "b"}',
        "surrogate",
        "response 1 holds half of a surrogate pair (\\ud800) at character 0",
    ),
    "NaN": (SCORED + b"[NaN]}", "not_finite", "NaN is not JSON"),
    "infinity": (SCORED + b"[-Infinity]}", "not_finite", "-Infinity is not JSON"),
    "infinity as a number": (SCORED + b"[1e999]}", "not_finite", "expected a finite number"),
    "beyond single precision": (SCORED + b"[1e39]}", "not_finite", "single precision"),
    "an integer beyond 2^53": (SCORED + b"[9007199254740993]}", "huge_integer", "at most 2^53"),
    "an integer of hundreds of digits": (SCORED + b"[" + b"9" * 400 + b"]}", "not_finite", "finite"),
    "an integer of thousands of digits": (SCORED + b"[" + b"9" * 5000 + b"]}", "huge_integer", "digits"),
    "a key given twice": (b'{"text": "q", "text": "q"}', "duplicate_key", "key 'text' is given twice in one object"),
    "a key given twice inside": (b'{"text": "q", "x": {"a": 1, "a": 2}}', "duplicate_key", "key 'a' is given twice"),
    "an id given twice": (said(**PAIR, id=7), "duplicate_id", "d.jsonl:1 too; give each record an id of its own"),
    "a column is missing": (said(prompt="q", responses=["a"]), "columns", "add 'scores'"),
    "a column is misspelt": (said(prompt="q", choosen="a", rejected="b"), "columns", "rename 'choosen' to 'chosen'"),
    "a response without a score": (said(prompt="q", response="a"), "columns", "prompt+completion: add 'completion'"),
    "a blank prompt alone": (said(prompt=" "), "blank_prompt", "the prompt is blank"),
    "columns of no format": (b'{"zzz": 1}', "columns", "; rename or join the columns to one of these"),
    "no column": (b"{}", "columns", "columns found: none; formats accepted: prompt+chosen+rejected, "),
    "columns of two formats": (said(prompt="q", responses=["a"], rank=[1], scores=[1]), "columns", "fit two formats"),
    "a column's name of several lines": (b'{"a\\nb": 1}', "columns", r"columns found: a\nb;"),
    "a message's key of several lines": (
        said(prompt=[{"a\r\nb": None}], chosen=[], rejected=[]),
        "message",
        r"message 1 is an object of a\r\nb; expected",
    ),
    "a column that cannot be honoured": (said(**PAIR, images=["x.png"]), "refused_column", "'images' cannot be"),
    "null": (said(prompt=None, chosen="a", rejected="b"), "wrong_type", "prompt is null; expected a string"),
    "a number for text": (said(prompt="q", chosen=3, rejected="b"), "wrong_type", "response 1 is int 3; expected a"),
    "a list for text": (said(prompt=["q"], chosen="a", rejected="b"), "message", "prompt, message 1 is str 'q'"),
    "text for a list": (b'{"prompt": "q", "responses": "a", "scores": [1]}', "wrong_type", "responses is str 'a'"),
    "a number for a list": (SCORED + b"1}", "wrong_type", "scores is int 1; expected a list"),
    "a truth value for a score": (SCORED + b"[true]}", "wrong_type", "score 1 is true; expected a number"),
    "text for a score": (SCORED + b'["0.5"]}', "wrong_type", "score 1 is str '0.5'; expected a number"),
    "null for a score": (SCORED + b"[null]}", "wrong_type", "score 1 is null"),
    "text for a rank": (said(prompt="q", responses=["a"], rank=["1"]), "wrong_type", "rank 1 is str '1'"),
    "too few scores": (said(prompt="q", responses=["a", "b"], scores=[1]), "wrong_count", "2 responses but 1 scores"),
    "no response": (said(prompt="q", responses=[], scores=[]), "no_response", "responses is empty"),
    "a list": (b"[1]", "not_an_object", "the row is a list; expected a JSON object"),
    "text": (b'"x"', "not_an_object", "the row is a str"),
    "nested deeply": (b'{"text": ' + b"[" * 64 + b"]" * 64 + b"}", "nested_too_deeply", "beyond 64 levels"),
    "nested endlessly": (b"[" * 100_000, "nested_too_deeply", "beyond 64 levels"),
    "a long line": (b'{"text": "' + b"x" * strict_json.MAX_LINE_BYTES + b'"}', "line_too_long", "longer than 16777216"),
    "an empty prompt": (said(prompt="", chosen="a", rejected="b"), "blank_prompt", "the prompt is blank; write it, or"),
    "a blank prompt": (said(prompt=" \n", completion="a"), "blank_prompt", "the prompt is blank"),
    "an empty response": (said(prompt="q", completion=""), "blank_response", "no response says anything"),
    "blank responses": (said(prompt="q", chosen=" ", rejected="\n"), "blank_response", "no response says anything"),
    "blank text": (said(text=" "), "blank_response", "no response says anything"),
    "a label of two": (said(prompt="q", completion="a", label=2), "label", "label is '2'; expected true or false"),
    "a label in words": (said(prompt="q", completion="a", label="yes"), "label", "label is 'yes'; expected true or"),
    "no label": (said(prompt="q", completion="a", label=None), "label", "label is 'None'; expected true or false"),
    "no common prompt": (said(chosen="a", rejected="b"), "no_common_prompt", "add a 'prompt' column"),
    "no common turn": (said(chosen="\n\nAssistant: a", rejected="b"), "no_common_prompt", "share no turn that begins"),
    "no common message": (said(chosen=talk("user"), rejected=talk("user")), "no_common_prompt", "share no message"),
    "another prompt than the messages'": (
        said(prompt="other", chosen=talk("user", "assistant"), rejected=talk("user", "assistant")),
        "no_common_prompt",
        "the prompt is none of the messages",
    ),
    "messages against text": (
        said(prompt=talk("user"), chosen="a", rejected="b"),
        "wrong_type",
        "mix strings with lists of messages",
    ),
    "the worse is chosen": (
        said(**PAIR, score_chosen=1, score_rejected=2),
        "contradiction",
        "chosen has a lower score than rejected (1 < 2)",
    ),
    "a margin below 0": (said(**PAIR, margin=-1), "contradiction", "lower score than rejected (-1 < 0)"),
    "half of the scores": (said(**PAIR, score_chosen=1), "wrong_type", "score_rejected is null; expected a number"),
    "no turn of the assistant": (said(messages=talk("user")), "no_response", "no turn of the assistant"),
    "the system twice": (
        said(messages=talk("system", "system", "user", "assistant")),
        "roles",
        "message 2 of the conversation is system after system; expected user or assistant",
    ),
    "the system in the middle": (said(messages=talk("user", "assistant", "system")), "roles", "is system after assis"),
    "two turns of the user": (said(messages=talk("user", "user", "assistant")), "roles", "is user after user"),
    "the assistant begins": (said(messages=talk("assistant")), "roles", "is assistant at first; expected system"),
    "the user ends": (
        said(messages=talk("user", "assistant", "user")),
        "roles",
        "expected it to begin and to end with",
    ),
    "an answer of the user": (
        said(prompt=talk("user", "assistant"), completion=talk("user", "assistant")),
        "roles",
        "response 1 is user, assistant; expected it to begin",
    ),
    "an unknown role": (
        said(messages=[{"role": "human", "content": "q"}, *talk("assistant")]),
        "roles",
        "message 1 has role str 'human'; expected one of system",
    ),
    "a message without content": (
        said(messages=[{"role": "user"}, *talk("assistant")]),
        "message",
        'message 1 is an object of role; expected {"role": ..., "content": ...}',
    ),
    "a message that calls a tool": (
        said(messages=[*talk("user"), {"role": "assistant", "content": "x", "tool_calls": [1]}]),
        "message",
        "is an object of role, content, tool_calls",
    ),
    "a rating that is none": (
        said(instruction="q", completions=[{"response": "a", "overall_score": "N/A"}]),
        "wrong_type",
        "overall_score of response 1 is str 'N/A'; expected a number",
    ),
    "no rating": (said(instruction="q", completions=[{"response": "a"}]), "rating", "config.data.score_weights"),
    "an answer without a rank": (
        said(prompt="q", answers=[{"answer": "a"}]),
        "wrong_type",
        "answers, item 1 is a dict of 1; expected an object with answer and rank",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_bad_record_is_one_line_with_its_place_or_skipped_and_counted(tmp_path, case):
    line, reason, message = RECORDS[case]
    path = write_rows(tmp_path / "d.jsonl", PAIR | {"id": 7}, line, PAIR)
    with pytest.raises(ValueError) as caught:
        read_records(path)
    error = str(caught.value)
    assert error.startswith(f"{path}:2: ") and error.isprintable() and message in error, error
    records, counts = read_records(path, bad_records="skip")
    assert {name: n for name, n in counts.items() if name.startswith("skipped/")} == {f"skipped/{reason}": 1}
    assert [record.id for record in records] == [0, 2] and counts["rows"] == 3


def test_what_is_odd_but_harmless_is_read_and_counted(tmp_path):
    lists = {"prompt": "q", "responses": ["a", "b"]}
    rows = [b"", lists | {"scores": [1, 1]}, {"prompt": "q", "responses": ["a"], "scores": [1]}, PAIR | {"extra": 1},
            PAIR | {"rejected": "a"}, PAIR | {"rejected": ""}, PAIR]  # fmt: skip
    _, counts = read_records(write_rows(tmp_path / "d.jsonl", *rows))
    found = {name: n for name, n in counts.items() if "/" not in name}
    assert found == {"rows": 7, "records": 5, "blank_lines": 1, "identical": 1, "blank_responses": 1,
                     "responses": 9}  # fmt: skip
    assert counts["ignored_column/extra"] == 1 and counts["format/preference"] == 4


def packed(content):
    return gzip.compress(content)


# Name of a file, its bytes -> a part of the message; under either policy, since nothing tells what is lost.
FILES = {
    "empty": ("d.jsonl", b"", "d.jsonl: has no rows; expected at least one: make or fetch it again"),
    "an empty list": ("d.json", b"[]", "d.json: has no rows"),
    "blank lines": ("d.jsonl", b"\n\n", "no record is left (2 blank_lines, 2 rows)"),
    "nothing that can be used": ("d.jsonl", said(**PAIR | {"rejected": "a"}), "1 identical, 1 rows); expected at"),
    "packed and cut off": ("d.jsonl.gz", packed(said(**PAIR) * 99)[:-12], "damaged or cut-off gzip file"),
    "not packed": ("d.jsonl.gz", said(**PAIR), "damaged or cut-off gzip file"),
    "of another kind": ("d.csv", b"a,b", "expected a file named *.jsonl, *.jsonl.gz, *.json, *.parquet, *.array_rec"),
    "a list that is cut off": ("d.json", b'[{"text": "a"},\n {"text', "d.json: not JSON at line 2, column 3"),
    "no Parquet": ("d.parquet", b"PAR1 no", "d.parquet: damaged, or of another kind ("),
    "no ArrayRecord": ("d.array_record", b"no" * 99, "d.array_record: "),
}  # fmt: skip


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, case, policy):
    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_records(tmp_path / name, bad_records=policy)
    error = str(caught.value)
    assert error.startswith(f"{tmp_path / name}") and message in error and error.isprintable(), error


def test_an_item_of_a_list_that_is_bad_is_skipped_too(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([PAIR, 3, PAIR | {"chosen": None}]))
    with pytest.raises(ValueError, match=r"d.json:row 2: the row is a int; expected a JSON object"):
        read_records(path)
    records, counts = read_records(path, bad_records="skip")
    assert len(records) == 1 and counts["skipped/not_an_object"] == counts["skipped/wrong_type"] == 1


def test_what_follows_a_line_that_is_too_long_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(strict_json, "MAX_LINE_BYTES", 60)
    for length in (61, 62, 121, 122, 123, 500):
        path = write_rows(tmp_path / "d.jsonl", PAIR, b"x" * length, PAIR, b"y" * length)
        records, counts = read_records(path, bad_records="skip")
        assert [record.where for record in records] == [f"{path}:1", f"{path}:3"]
        assert counts["rows"] == 4 and counts["skipped/line_too_long"] == 2
