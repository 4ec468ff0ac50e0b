"""Formats, counts, and everything that must be refused with its file and line."""

import gzip
import json
import random

import pytest

from palign.data import readers
from palign.data.readers import read_records
from palign.data.records import best_response, make_record

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def write(tmp_path, *rows, name="d.jsonl"):
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path = tmp_path / name
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize(
    ("row", "prompt", "responses", "scores"),
    [
        (PAIR, "q", ("a", "b"), (1.0, 0.0)),
        ({"prompt": "q", "responses": ["a", "b", "c"], "scores": [0, 2.5, 2.5]}, "q", ("a", "b", "c"), (0.0, 2.5, 2.5)),
        ({"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]}, "q", ("a", "b"), (-1.0, -2.0)),
        ({"prompt": "q", "completion": "a", "label": True}, "q", ("a",), (1.0,)),
        ({"prompt": "q", "completion": "a", "label": False}, "q", ("a",), (-1.0,)),
        ({"prompt": "q", "completion": ""}, "q", ("",), (0.0,)),
        ({"text": "t"}, "", ("t",), (0.0,)),
    ],
)
def test_each_format_is_told_by_its_columns(tmp_path, row, prompt, responses, scores):
    for name in ("d.jsonl", "d.jsonl.gz"):
        (record,), counts = read_records(write(tmp_path, row, name=name))
        assert record[:3] == (prompt, responses, scores)
        assert record.where.endswith(f"{name}:1") and record.id == 0
        assert counts["records"] == 1 and counts["responses"] == len(responses)


TURN = "\n\nHuman: x\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (TURN + " yes", TURN + " no", TURN),
        (TURN + " yes", TURN + " yes and", TURN),  # one is a prefix of the other
        (TURN, TURN + " no", TURN),  # an answer that ends at once
        (TURN + " a" + TURN + " yes", TURN + " a" + TURN + " no", TURN + " a" + TURN),  # two turns
        (TURN + " a" + TURN + " yes", TURN + " b" + TURN + " yes", TURN),  # they part in the first turn
    ],
)
def test_an_implicit_prompt_ends_with_the_last_common_assistant_turn(tmp_path, chosen, rejected, prompt):
    (record,), _ = read_records(write(tmp_path, {"chosen": chosen, "rejected": rejected}))
    assert record.prompt == prompt
    assert tuple(prompt + response for response in record.responses) == (chosen, rejected)


def test_counts_say_what_was_skipped_and_ids_stay_line_numbers(tmp_path):
    rows = [PAIR, {**PAIR, "rejected": "a"}, b"", {**PAIR, "source": 3}]
    records, counts = read_records(write(tmp_path, *rows))
    assert [record.id for record in records] == [0, 3]
    assert counts == {
        "lines": 4, "records": 2, "blank_lines": 1, "identical": 1, "responses": 4, "ignored_column/source": 1,
    }  # fmt: skip
    assert len(read_records(write(tmp_path, *[PAIR] * 5), limit=3)[0]) == 3


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = "a\u2028b\u0085c\x0bd\x1ce\r\n\0"
    rows = [{**PAIR, "chosen": text}, b"oops"]
    records, _ = read_records(write(tmp_path, rows[0], json.dumps(PAIR).encode() + b"\r"))
    assert [record.responses[0] for record in records] == [text, "a"]
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not JSON"):
        read_records(write(tmp_path, *rows))


BAD = {
    b'{"prompt": "q", "chosen": "a", "rejected": "b"': "not JSON at column",
    b'{"prompt": "q", "responses": ["a"], "scores": [NaN]}': "NaN is not JSON",
    b'{"prompt": "q", "responses": ["a"], "scores": [-Infinity]}': "-Infinity is not JSON",
    b'{"prompt": "q", "responses": ["a"], "scores": [1e999]}': "finite",
    b'{"prompt": "q", "responses": ["a"], "scores": [1e39]}': "single precision",
    b'{"prompt": "q", "responses": ["a"], "scores": [' + b"9" * 400 + b"]}": "finite",
    b'{"prompt": "q", "responses": ["a"], "scores": [' + b"9" * 5000 + b"]}": "digits",
    b'{"prompt": "q", "responses": ["a"], "scores": [true]}': "score 1 is true; expected a number",
    b'{"prompt": "q", "responses": ["a"], "scores": ["0.5"]}': "score 1 is str '0.5'; expected a number",
    b'{"prompt": "q", "responses": ["a"], "scores": [null]}': "score 1 is null",
    b'{"prompt": "q", "responses": ["a"], "scores": 1}': "scores is int 1; expected a list",
    b'{"prompt": "q", "responses": "a", "scores": [1]}': "responses is str 'a'; expected a list",
    b'{"prompt": "q", "responses": [], "scores": []}': "responses is empty",
    b'{"prompt": "q", "responses": ["a"], "scores": [1, 2]}': "1 responses but 2 scores",
    b'{"prompt": "q", "responses": ["a"], "rank": ["1"]}': "rank 1 is str '1'",
    b'{"prompt": "q", "responses": ["a"], "rank": 1}': "expected a list",
    b'{"prompt": "q", "prompt": "q", "chosen": "a", "rejected": "b"}': "'prompt' is given twice",
    b'{"prompt": "q", "chosen": "\\ud800", "rejected": "b"}': r"half of a surrogate pair \(\\ud800\)",
    b'{"prompt": null, "chosen": "a", "rejected": "b"}': "prompt is null; expected a string",
    b'{"prompt": "q", "chosen": 3, "rejected": "b"}': "response 1 is int 3; expected a string",
    b'{"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}': "mix strings with lists of messages",
    b'{"chosen": [{"role": "user", "content": "q"}], "rejected": "b"}': "mix strings with lists of messages",
    b'{"chosen": "a", "rejected": "b"}': "add a 'prompt' column",
    b'{"prompt": "q", "completion": "a", "label": 2}': "expected true or false",
    b'{"prompt": "q", "completion": "a", "label": "yes"}': "expected true or false",
    b'{"prompt": "q", "choosen": "a", "rejected": "b"}': "rename 'choosen' to 'chosen'",
    b'{"prompt": "q", "responses": ["a"]}': "add 'scores'",
    b'{"prompt": "q", "responses": ["a"], "rank": [1], "scores": [1]}': "fit two formats",
    b"{}": "columns found: none",
    b"[1]": "holds a list; expected a JSON object",
    b'"x"': "holds a str",
    b"\xef\xbb\xbf{}": "byte-order mark",
    b"\xff\xfe{\x00": "byte-order mark",
    b'{"text": "\xe9"}': "byte 0xe9 at 10 is not UTF-8",
    b"[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=range(len(BAD)))
def test_bad_lines_are_refused_in_one_line_with_their_place(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_records(write(tmp_path, PAIR, line))
    assert f"{tmp_path}/d.jsonl:2: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path, PAIR, name="pairs.jsonl.gz")
    for bad, message in [
        (tmp_path / "pair.jsonl.gz", "did you mean 'pairs.jsonl.gz'"),
        (tmp_path / "x.csv", "expected a file named"),
        (tmp_path, "expected a file named"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_records(bad)
    with pytest.raises(ValueError, match="no record in 1 lines"):
        read_records(write(tmp_path, b""))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match="cut-off gzip"):
        read_records(path)
    path.write_bytes(b"plain")
    with pytest.raises(ValueError, match="gzip"):
        read_records(path)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 20)
    with pytest.raises(ValueError, match=r"d.jsonl:1: longer than 20 bytes"):
        read_records(write(tmp_path, PAIR))
    with pytest.raises(ValueError, match="limit is 0"):
        read_records(path, limit=0)


def test_random_bytes_give_a_value_error_and_nothing_else(tmp_path):
    rng = random.Random(0)
    good = json.dumps({"prompt": "q", "responses": ["é", "b"], "scores": [1.5, 2]}, ensure_ascii=False).encode()
    for _ in range(2000):
        line = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            line[rng.randrange(len(line))] = rng.choice(b'{}[]",:\\u0\x00\xff9eE-nNtI')
        try:
            row = readers.parse_row(bytes(line), "f:1")
            readers.find_format(frozenset(row), "f:1")
            make_record(row["prompt"], row["responses"], row["scores"], 0, "f:1")
        except ValueError as error:
            assert str(error).startswith("f:1: ") and "\n" not in str(error)


def test_best_response_is_the_first_of_the_best():
    record = make_record("q", ["a", "b", "c"], [0, 2, 2], 7, "f:1")
    assert best_response(record)[:4] == ("q", ("b",), (2.0,), 7)


@pytest.mark.parametrize("id", [-1, True, 2**31, "3"])
def test_ids_are_int32(id):
    with pytest.raises(ValueError, match="id is"):
        make_record("q", ["a"], [0], id, "f:1")
