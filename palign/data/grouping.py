"""From pairs to lists: pairs of one prompt that rank their responses without contradiction become one record."""

from collections.abc import Sequence

from palign.data.records import Record, Text


def group_pairs(records: Sequence[Record]) -> tuple[list[Record], dict[str, int]]:
    """Joins pairs of the same prompt into lists, where their preferences follow from one ranking.

    A response's score is the number of responses that it beats, directly or through others. The pairs follow from a
    ranking if a higher score means exactly that one beats the other: no circle, and responses that were not compared,
    directly or through others, stand alike to all others and so may share a rank. "a over b, a over c" is such a
    ranking; "a over b, c over d" is not, since nothing says how a and c compare.

    Args:
        records: the records; those that are no pair with a preference are left alone.

    Returns:
        The records, a list at the place of its first pair, and the counts: `grouped_pairs` that went into `lists`, and
        `ungrouped_pairs` of prompts with several pairs that no ranking explains; those stay as they are.
    """
    by_prompt: dict[Text, list[Record]] = {}
    for record in records:
        if _is_pair(record):
            by_prompt.setdefault(record.prompt, []).append(record)
    lists: dict[int, Record] = {}  # id of the first pair -> the list
    gone: set[int] = set()
    counts = {"grouped_pairs": 0, "lists": 0, "ungrouped_pairs": 0}
    for pairs in by_prompt.values():
        if len(pairs) < 2:
            continue
        joined = _join(pairs)
        if joined is None:
            counts["ungrouped_pairs"] += len(pairs)
            continue
        lists[joined.id] = joined
        gone.update(pair.id for pair in pairs[1:])
        counts["grouped_pairs"] += len(pairs)
        counts["lists"] += 1
    return [lists.get(record.id, record) for record in records if record.id not in gone], counts


def _is_pair(record: Record) -> bool:
    return len(record.scores) == 2 and record.scores[0] != record.scores[1]


def _join(pairs: Sequence[Record]) -> Record | None:
    """The list of several pairs; None where no ranking explains them."""
    places: dict[Text, int] = {}
    for pair in pairs:
        for response in pair.responses:
            places.setdefault(response, len(places))
    beaten: list[set[int]] = [set() for _ in places]
    for pair in pairs:
        first, second = (places[response] for response in pair.responses)
        better, worse = (first, second) if pair.scores[0] > pair.scores[1] else (second, first)
        beaten[better].add(worse)
    for through in range(len(places)):  # what a response beats through others
        for one in beaten:
            if through in one:
                one |= beaten[through]
    scores = [len(one) for one in beaten]
    count = range(len(places))
    if any((b in beaten[a]) != (scores[a] > scores[b]) for a in count for b in count):
        return None
    return pairs[0]._replace(responses=tuple(places), scores=tuple(map(float, scores)))
