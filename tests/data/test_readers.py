import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palign.data.readers import read_records
from palign.data.records import RecordError, best_response, make_record
from tests.data.samples import write_rows

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_counts_say_what_was_skipped_and_ids_stay_row_numbers(tmp_path):
    rows = [PAIR, {**PAIR, "rejected": "a"}, b"", {**PAIR, "source": 3, "rejected": " "}]
    records, counts = read_records(write_rows(tmp_path / "d.jsonl", *rows))
    assert [record.id for record in records] == [0, 3]
    assert counts == {
        "rows": 4, "records": 2, "blank_lines": 1, "identical": 1, "blank_responses": 1, "responses": 4,
        "format/preference": 3, "ignored_column/source": 1,
    }  # fmt: skip


def test_no_more_is_read_than_the_limit_and_ids_begin_where_they_are_told_to(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", PAIR, PAIR, PAIR, b"oops")
    records, counts = read_records(path, limit=3, first_id=7)
    assert [record.id for record in records] == [7, 8, 9] and counts["rows"] == 3
    with pytest.raises(ValueError, match="limit is 0"):
        read_records(path, limit=0)
    with pytest.raises(ValueError, match="bad_records is 'drop'; expected one of error, skip"):
        read_records(path, bad_records="drop")


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json"])
def test_only_a_line_feed_ends_a_line(tmp_path, name):
    text = "a\u2028b\u0085c\x0bd\x1ce\r\n"
    path = write_rows(tmp_path / name, {**PAIR, "chosen": text}, json.dumps(PAIR).encode() + b"\r")
    records, _ = read_records(path)
    assert [record.responses[0] for record in records] == [text, "a"]
    assert [record.where for record in records] == [f"{path}:1", f"{path}:2"]


def test_text_of_any_language_comes_back_as_it_was(tmp_path):
    texts = ["日本語", "مرحبا بالعالم", "👩‍👩‍👧‍👦 z\u200bw\u200d", "e\u0301 é", "\ufeff in the middle", "\U0010ffff"]
    (record,), _ = read_records(
        write_rows(tmp_path / "d.jsonl", {"prompt": "q\u202e", "responses": texts, "scores": [0] * 6})
    )
    assert record[:2] == ("q\u202e", tuple(texts))


def test_a_list_of_one_file_may_have_another_number_of_responses_than_the_next(tmp_path):
    rows = [{"prompt": "q", "responses": list("abcdef"[:K]), "scores": [1] * K} for K in (1, 6, 2)]
    records, counts = read_records(write_rows(tmp_path / "d.jsonl", *rows))
    assert [len(record.scores) for record in records] == [1, 6, 2] and counts["responses"] == 9


def test_rated_responses_of_one_prompt_become_one_list_wherever_they_stand(tmp_path):
    zero = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 0)
    rows = [
        {"prompt": prompt, "response": response, "helpfulness": score, **zero}
        for prompt, response, score in [("p", "a", 4), ("q", "b", 1), ("p", "c", 2), ("r", "d", 3)]
    ]
    path = write_rows(tmp_path / "d.jsonl", *rows)
    records, counts = read_records(path, score_weights={"helpfulness": 2.0})
    assert [record[:4] for record in records] == [
        ("p", ("a", "c"), (8.0, 4.0), 0), ("q", ("b",), (2.0,), 1), ("r", ("d",), (6.0,), 3),
    ]  # fmt: skip
    assert (counts["rows"], counts["records"], counts["responses"]) == (4, 3, 4)
    records, _ = read_records(path, limit=2)  # the list of p is whole
    assert [record.responses for record in records] == [("a", "c"), ("b",)]
    assert read_records(path)[0][0].scores == pytest.approx((4 * 0.65, 2 * 0.65))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
COLUMNS = ["prompt", "chosen", "rejected", "responses", "scores", "rank", "completion", "label", "messages", "text",
           "answers", "context", "completions", "instruction", "id", "tools", "margin"]  # fmt: skip
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()}))
ROWS = st.dictionaries(st.sampled_from(COLUMNS) | st.text(), TURNS | st.text() | JSON, max_size=5)
LINES = st.lists(st.binary(max_size=60) | ROWS.map(lambda row: json.dumps(row).encode()), max_size=4)


@settings(max_examples=200, deadline=None)
@given(lines=LINES)
def test_whatever_a_file_holds_it_gives_records_or_an_error_of_one_line(lines, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        records, counts = read_records(path)
        assert counts["records"] == len(records) > 0
    except ValueError as error:
        assert str(error).startswith(f"{path}:") and len(str(error).splitlines()) == 1
        assert str(error).encode() and (str(error).isprintable())
    try:
        kept, counts = read_records(path, bad_records="skip")
    except ValueError as error:
        assert "no record is left" in str(error) or "no rows" in str(error)
    else:
        dropped = sum(n for name, n in counts.items() if name.startswith("skipped/") or name in ("identical", "ties"))
        assert counts["rows"] == len(kept) + dropped + counts["blank_lines"]


@settings(max_examples=100, deadline=None)
@given(noise=st.binary(max_size=200), place=st.integers(0, 400))
def test_a_damaged_gzip_or_json_file_gives_records_or_an_error_of_one_line(noise, place, tmp_path_factory):
    good = json.dumps([PAIR, {"text": "é"}, {"messages": [{"role": "user", "content": "q"}]}]).encode()
    for name, content in (("any.json", good), ("any.jsonl.gz", gzip.compress(good))):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content[:place] + noise + content[place + len(noise) :])
        try:
            read_records(path, bad_records="skip")
        except ValueError as error:
            assert str(error).startswith(f"{path}") and len(str(error).splitlines()) == 1


def test_best_response_is_the_first_of_the_best():
    record = make_record("q", ["a", "b", "c"], [0, 2, 2], 7, "f:1")
    assert best_response(record)[:4] == ("q", ("b",), (2.0,), 7)


@pytest.mark.parametrize("id", [-1, True, 2**31, "3"])
def test_ids_are_int32(id):
    with pytest.raises(RecordError, match="id is"):
        make_record("q", ["a"], [0], id, "f:1")
