"""What each token of a review is worth: the gold reward that the world expects with it, less the one without it.

The world's writer is a finite process, so the expected gold reward of a review that has begun is a sum over everything
that the writer may go on with. No model takes part, and nothing is sampled.

The expectation is of three things apart, sentiment, politeness and length, since gold adds them up; sentences are
independent once the writer's tone and the outline are known, so each is a sum over sentences.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from palign.data import world

_MOST_SENTIMENT = 2  # of one sentence
_MOST_WORDS = 10  # of one sentence, full stop included


class _Sentences(NamedTuple):
    """Every sentence of one kind, sorted, with its chance and what the reward sees of it."""

    texts: list[str]
    chance: np.ndarray  # [N], sums to 1
    sentiment: np.ndarray  # [N]
    words: np.ndarray  # [N]
    politeness: np.ndarray  # [N]


class _Outlook(NamedTuple):
    """What is still to come: distributions of sentiment (from the least) and length, and the mean politeness."""

    chance: float  # of what was written so far
    sentiment: np.ndarray
    words: np.ndarray
    politeness: float


_NOTHING = _Outlook(1.0, np.ones(1), np.ones(1), 0.0)


def token_credit(prompt: str, response: str) -> np.ndarray:
    """Credits each word of a review, and its end, with the change of the expected gold reward that it brings.

    `credit_t = E[gold | y_1 .. y_t] - E[gold | y_1 .. y_{t-1}]`

    The expectation is over how the world's writer goes on (`sample_response` for this prompt). It is the advantage of
    the token under the writer: an adjective behind "not" is credited with what it turns into, "not" itself with what
    it makes likely, and the end with what it forgoes.

    Args:
        prompt: A prompt of this world; its mood matters.
        response: A review for which `is_grammatical` holds.

    Returns:
        `[words + 1]` float64, the last entry for the end of the review. The sum is the review's gold reward less the
        expected one of an empty page.

    Raises:
        ValueError: If the review is not one that the writer could write.

    Example:
        >>> token_credit("a calm", "it was good .").round(2).tolist()
        [0.13, -0.0, 0.88, -0.08, -0.27]
        >>> token_credit("a calm", "it was not good .").round(2).tolist()
        [0.13, -0.0, -0.02, -1.25, 0.15, -0.19]
    """
    if not world.is_grammatical(response):
        raise ValueError(f"{response!r} is no review of this world; what would follow its first words is not defined")
    words = tuple(response.split())
    values = [expected_gold(prompt, " ".join(words[:t])) for t in range(len(words) + 1)]
    return np.diff([*values, world.gold_reward(prompt, response)])


def expected_gold(prompt: str, written: str) -> float:
    """The expected gold reward of a review that begins with these words, over how the world's writer goes on.

    Args:
        prompt: A prompt of this world; only its mood matters, calm if there is none.
        written: The words so far, "" for none. Whether the review ends after them is not known.

    Returns:
        The expectation, exact up to rounding.

    Raises:
        ValueError: If no review begins so.
    """
    mood = next((word for word in prompt.split() if word in world.PLEASED), "calm")
    return _expected_gold(mood, written)


@functools.lru_cache(maxsize=1 << 16)
def _expected_gold(mood: str, written: str) -> float:
    *done, begun = (f"{written} " if written else "").split(". ")
    sentences = [f"{sentence}." for sentence in done]
    total = mass = 0.0
    for pleased, outline in itertools.product((True, False), world.OUTLINES):
        tone = world.PLEASED[mood] if pleased else 1 - world.PLEASED[mood]
        outlook = _outlook(outline, pleased, sentences, begun)
        chance = tone * world.OUTLINES[outline] * outlook.chance
        mass += chance
        total += chance * _gold(written, outlook) if chance else 0.0
    if not mass:
        raise ValueError(f"no review of this world begins with {written!r}")
    return total / mass


def _gold(written: str, outlook: _Outlook) -> float:
    """Expected gold of the words written and of what is to come."""
    bound = (len(outlook.sentiment) - 1) // 2
    sentiment = world.sentiment(_whole_sentences(written)) + np.arange(-bound, bound + 1)
    words = _whole_sentences(written).count(" ") + bool(_whole_sentences(written)) + np.arange(len(outlook.words))
    price = world.WORD_PRICE * np.maximum(0, words - world.FREE_WORDS)
    polite = world.politeness(_whole_sentences(written)) + outlook.politeness
    return float(outlook.sentiment @ (2 * np.tanh(sentiment / 2)) - outlook.words @ price + polite)


def _whole_sentences(written: str) -> str:
    """The words up to the last full stop: a sentence that was begun is part of the outlook."""
    return written[: written.rfind(".") + 1]


def _outlook(outline: str, pleased: bool, sentences: Sequence[str], begun: str) -> _Outlook:
    """What follows under one tone and one outline, and the chance of what was written under them."""
    if len(sentences) + bool(begun) > len(outline):
        return _NOTHING._replace(chance=0.0)
    chance = math.prod(_chance(_sentences(kind, pleased), s) for kind, s in zip(outline, sentences, strict=False))
    if not chance:
        return _NOTHING._replace(chance=0.0)
    kinds = outline[len(sentences) :]
    if not kinds:
        return _NOTHING._replace(chance=chance)
    current, rest = _going_on(kinds[0], pleased, begun), _rest(kinds[1:], pleased)
    return _joined(current, rest)._replace(chance=chance * current.chance)


@functools.cache
def _rest(kinds: str, pleased: bool) -> _Outlook:
    return functools.reduce(_joined, (_going_on(kind, pleased, "") for kind in kinds), _NOTHING)


def _joined(first: _Outlook, second: _Outlook) -> _Outlook:
    """The sum of two independent parts."""
    return _Outlook(
        first.chance * second.chance,
        np.convolve(first.sentiment, second.sentiment),
        np.convolve(first.words, second.words),
        first.politeness + second.politeness,
    )


@functools.lru_cache(maxsize=1 << 14)
def _going_on(kind: str, pleased: bool, begun: str) -> _Outlook:
    """The sentences of a kind that begin so (whole words, each with its space), and the chance of that beginning."""
    every = _sentences(kind, pleased)
    here = slice(bisect.bisect_left(every.texts, begun), bisect.bisect_left(every.texts, begun + "\x7f"))
    chance = float(every.chance[here].sum())
    if not chance:
        return _NOTHING._replace(chance=0.0)
    share = every.chance[here] / chance
    return _Outlook(
        chance,
        np.bincount(every.sentiment[here] + _MOST_SENTIMENT, share, 2 * _MOST_SENTIMENT + 1),
        np.bincount(every.words[here], share, _MOST_WORDS + 1),
        float(share @ every.politeness[here]),
    )


def _chance(every: _Sentences, sentence: str) -> float:
    i = bisect.bisect_left(every.texts, sentence)
    return float(every.chance[i]) if i < len(every.texts) and every.texts[i] == sentence else 0.0


@functools.cache
def _sentences(kind: str, pleased: bool) -> _Sentences:
    writers = {
        "F": lambda: ((filler, 1 / len(world.FILLERS)) for filler in world.FILLERS),
        "O": lambda: _opinions(pleased),
        "P": lambda: ((end, weight / sum(world.POLITE.values())) for end, weight in world.POLITE.items()),
    }
    ordered = sorted((f"{text} .", chance) for text, chance in writers[kind]())
    texts = [text for text, _ in ordered]
    return _Sentences(
        texts,
        np.asarray([chance for _, chance in ordered]),
        np.asarray([world.sentiment(text) for text in texts]),
        np.asarray([len(text.split()) for text in texts]),
        np.asarray([world.politeness(text) for text in texts]),
    )


def _opinions(pleased: bool) -> Iterator[tuple[str, float]]:
    """Every judgement with its chance, the law of the world's `sample_response`."""
    openings = [f"{subject} {verb}" for subject in world.SUBJECTS for verb in world.VERBS]
    intensifiers = [("", 1 - world.INTENSIFIED)]
    intensifiers += [(f" {word}", world.INTENSIFIED / len(world.INTENSIFIERS)) for word in world.INTENSIFIERS]
    for negation, negated in (("", False), *((f" {word}", True) for word in world.NEGATIONS)):
        share = world.NEGATED / len(world.NEGATIONS) if negated else 1 - world.NEGATED
        for words, chance in _adjectives(pleased, negated):
            for opening, (intensifier, strength) in itertools.product(openings, intensifiers):
                yield f"{opening}{negation}{intensifier} {words}", share * strength * chance / len(openings)


def _adjectives(pleased: bool, negated: bool) -> Iterator[tuple[str, float]]:
    """One adjective or two: favourable ones are positive words, or negative ones behind a negation."""
    words = {favourable: world.POSITIVE if favourable != negated else world.NEGATIVE for favourable in (True, False)}
    for favourable in (True, False):
        agrees = world.AGREEMENT if favourable == pleased else 1 - world.AGREEMENT
        for first in words[favourable]:
            chance = agrees / len(words[favourable])
            yield first, chance * (1 - world.COUPLED)
            for same in (True, False):
                tone = favourable == same
                coupled = world.COUPLED * (world.AGREEMENT if same else 1 - world.AGREEMENT) / len(words[tone])
                yield from ((f"{first} and {second}", chance * coupled) for second in words[tone])
