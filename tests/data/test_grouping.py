import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palign.data.grouping import group_pairs
from palign.data.records import make_record


def pairs(text, prompt="q"):
    """Records of `a>b b>c`; with `<` the second response is the better one."""
    found = []
    for id, pair in enumerate(text.split()):
        scores = [1.0, 0.0] if pair[1] == ">" else [0.0, 1.0]
        found.append(make_record(prompt, [pair[0], pair[2]], scores, id, f"f:{id + 1}"))
    return found


@pytest.mark.parametrize(
    ("given", "ranking"),
    [
        ("a>b b>c", {"a": 2, "b": 1, "c": 0}),
        ("c<b a>b", {"a": 2, "b": 1, "c": 0}),
        ("a>b a>c a>d", {"a": 3, "b": 0, "c": 0, "d": 0}),  # the best against the rest
        ("a>c b>c", {"a": 1, "b": 1, "c": 0}),
        ("a>c a>d b>c b>d", {"a": 2, "b": 2, "c": 0, "d": 0}),
        ("a>b a>b", {"a": 1, "b": 0}),  # said twice
        ("a>b b>a", None),  # a contradiction
        ("a>b b>c c>a", None),  # a circle
        ("a>b c>d", None),  # how a and c compare is not said
        ("a>b b>c a>d", None),  # where d stands beside b and c is not said
    ],
)
def test_pairs_of_one_prompt_become_a_list_where_one_ranking_explains_them(given, ranking):
    records, counts = group_pairs(pairs(given))
    num = len(given.split())
    if ranking is None:
        assert records == pairs(given)
        assert counts == {"grouped_pairs": 0, "lists": 0, "ungrouped_pairs": num}
    else:
        (record,) = records
        assert dict(zip(record.responses, record.scores, strict=True)) == ranking
        assert (record.prompt, record.id, record.where) == ("q", 0, "f:1")
        assert counts == {"grouped_pairs": num, "lists": 1, "ungrouped_pairs": 0}


def test_other_records_and_single_pairs_stay_where_they_are():
    (alone,) = pairs("a>b", "alone")
    tie = make_record("q", ["a", "b"], [1, 1], 7, "f:8")
    of_three = make_record("q", ["x", "y", "z"], [1, 2, 3], 8, "f:9")
    first, second = (pair._replace(id=pair.id + 9) for pair in pairs("a>b b>c"))
    records, _ = group_pairs([alone, first, tie, of_three, second])
    assert [record.id for record in records] == [0, 9, 7, 8]
    assert records[1].responses == ("a", "b", "c") and records[2:] == [tie, of_three]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")).filter(lambda p: p[0] != p[1]), min_size=2))
def test_a_list_says_what_its_pairs_say_and_nothing_else_that_is_strict(won):
    """Against every ranking of up to four responses, tried one by one."""
    text = " ".join(f"{better}>{worse}" for better, worse in won)
    names = sorted(set(itertools.chain.from_iterable(won)))
    beats = set(won)
    while more := {(a, d) for a, b in beats for c, d in beats if b == c} - beats:
        beats |= more
    explained = any(
        all(((a, b) in beats) == (levels[i] > levels[j]) for i, a in enumerate(names) for j, b in enumerate(names))
        for levels in itertools.product(range(len(names)), repeat=len(names))
    )
    records, counts = group_pairs(pairs(text))
    assert (len(records) == 1) == explained == bool(counts["lists"])
    if explained:
        score = dict(zip(records[0].responses, records[0].scores, strict=True))
        assert {(a, b) for a in names for b in names if score[a] > score[b]} == beats
