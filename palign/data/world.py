"""The embedded world: restaurant reviews from a small grammar, judged by a program. No download, no model, numpy only.

A prompt sets a scene, a response is a review of one to three sentences:

    a happy lunch review of soup at the corner cafe :
    we came with friends . the food was not very bad . thank you .

`gold_reward` reads the words only. Whether a response is still a sentence of the language is a separate question,
answered by `is_grammatical`, which the reward never asks: a policy pushed too far starts to write rewarded words
without a sentence around them, and the two figures part company.

The response language is regular. Each production below is a weighted choice of word strings, and the recogniser is made
from the same tables as the sampler, so both describe exactly the same set of strings.
"""

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

MOODS = ("happy", "calm", "tired", "grumpy")
OCCASIONS = ("lunch", "dinner", "sunday", "holiday")
DISHES = ("soup", "pasta", "pizza", "salad", "curry", "fish", "rice", "noodles", "stew", "pie", "cake", "tea")
SITES = ("corner", "garden", "harbour", "station")
VENUES = ("cafe", "grill", "inn")

POSITIVE = ("good", "great", "lovely", "fresh", "warm", "pleasant", "perfect")
NEGATIVE = ("bad", "awful", "bland", "stale", "cold", "dull", "poor")
NEGATIONS = ("not", "never")
INTENSIFIERS = ("very", "really", "quite")
SUBJECTS = ("the food", "the service", "the room", "it", "everything")
VERBS = ("was", "felt")
# The two words of politeness that the reward knows.
COURTESIES = ("thank", "please")

FILLERS = tuple(
    " ".join(parts)
    for parts in itertools.product(("we", "i"), ("came", "ate", "sat"), ("with friends", "by the window", "outside"))
)
# How a review may end, with weights.
POLITE = {
    "thank you": 0.35,
    "thank you all": 0.15,
    "please visit": 0.2,
    "please come back": 0.15,
    "thank you and please visit": 0.15,
}
# The orders in which sentences may follow: F filler, O opinion, P politeness. At most three sentences.
OUTLINES = {"O": 0.15, "FO": 0.2, "OO": 0.15, "FOO": 0.1, "OP": 0.15, "FOP": 0.1, "OOP": 0.15}

# The chance that a writer in this mood is pleased.
PLEASED = {"happy": 0.74, "calm": 0.66, "tired": 0.58, "grumpy": 0.5}
# The chance that a single judgement follows the writer's tone.
AGREEMENT = 0.8
NEGATED, INTENSIFIED, COUPLED = 0.3, 0.3, 0.4

# A negation turns the sentiment of this many following words, up to the end of its sentence.
NEGATION_SCOPE = 4
# Words (full stops included) that cost nothing, and the price of each one after them.
FREE_WORDS = 8
WORD_PRICE = 0.05


def all_prompts() -> list[str]:
    """Lists every prompt of the world (2304), in a fixed order.

    Returns:
        Distinct strings such as "a calm sunday review of pie at the garden inn :".
    """
    slots = itertools.product(MOODS, OCCASIONS, DISHES, SITES, VENUES)
    return [
        f"a {mood} {occasion} review of {dish} at the {site} {venue} :" for mood, occasion, dish, site, venue in slots
    ]


def split_prompts(seed: int, heldout: int = 768) -> tuple[list[str], list[str]]:
    """Splits the prompts into training and held-out ones: disjoint, and the same for the same seed.

    Args:
        seed: Names the split.
        heldout: How many prompts to hold out.

    Returns:
        (training prompts, held-out prompts), each in random order.

    Raises:
        ValueError: If `heldout` leaves either side empty.
    """
    prompts = all_prompts()
    if not 0 < heldout < len(prompts):
        raise ValueError(f"heldout must lie between 1 and {len(prompts) - 1}, got {heldout}")
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[i] for i in order[heldout:]], [prompts[i] for i in order[:heldout]]


def sample_prompts(rng: np.random.Generator, n: int, prompts: Sequence[str] | None = None) -> list[str]:
    """Draws prompts in random passes, so that none repeats before all were seen.

    Args:
        rng: A numpy generator.
        n: How many to draw.
        prompts: Where to draw from; every prompt of the world if None.

    Returns:
        n prompts, all different while n is at most the number to draw from.

    Raises:
        ValueError: If `n` is negative, or `prompts` is empty and n is not 0.
    """
    pool = list(all_prompts() if prompts is None else prompts)
    if n < 0 or (n and not pool):
        raise ValueError(f"cannot draw {n} prompts from {len(pool)}")
    passes = [rng.permutation(len(pool)) for _ in range(-(-n // max(len(pool), 1)))]
    return [pool[i] for i in itertools.islice(itertools.chain.from_iterable(passes), n)]


def sample_response(rng: np.random.Generator, prompt: str) -> str:
    """Writes a review as a person would in this mood: sometimes pleased, often not, not always polite.

    Args:
        rng: A numpy generator.
        prompt: A prompt of this world; only its mood matters. A prompt without one is answered calmly.

    Returns:
        A response for which `is_grammatical` holds, of 4 to 24 words.
    """
    mood = next((word for word in prompt.split() if word in PLEASED), "calm")
    pleased = bool(rng.random() < PLEASED[mood])
    outline = _weighted(rng, OUTLINES)
    writers = {
        "F": lambda: _choose(rng, FILLERS),
        "O": lambda: _opinion(rng, pleased),
        "P": lambda: _weighted(rng, POLITE),
    }
    return " ".join(f"{writers[kind]()} ." for kind in outline)


def corpus(rng: np.random.Generator, n: int, prompts: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Writes n prompts with one response each, for supervised training.

    Args:
        rng: A numpy generator.
        n: How many.
        prompts: Where to draw prompts from (the training side of `split_prompts`); every prompt if None.

    Returns:
        n pairs (prompt, response).
    """
    return [(prompt, sample_response(rng, prompt)) for prompt in sample_prompts(rng, n, prompts)]


def gold_reward(prompt: str, response: str) -> float:
    """The reward that stands for human preference in this world.

        gold = 2 tanh(sentiment / 2) + politeness - length penalty

    Sentiment saturates near +-2, politeness is at most 1, so the reward stays below 3. The best grammatical responses
    come to about 2.4; word lists that are no sentences get closer to 3.

    Args:
        prompt: Not read: what is good does not depend on the scene. Kept so that rewards share one signature.
        response: The words to judge, separated by spaces. Words outside the vocabulary only count as length.

    Returns:
        The reward; 0 for an empty response.

    Example:
        >>> round(gold_reward("", "it was good and fresh . thank you ."), 3)
        1.973
        >>> round(gold_reward("", "it was not good ."), 3)
        -0.924
    """
    del prompt
    return 2 * math.tanh(sentiment(response) / 2) + politeness(response) - length_penalty(response)


def sentiment(response: str) -> int:
    """Counts positive words minus negative words, each turned by the negations whose scope covers it.

    "not" and "never" reach over the next `NEGATION_SCOPE` words of their sentence. Two negations that cover the same
    word cancel.

    Args:
        response: Words separated by spaces.

    Returns:
        The signed count, before saturation.

    Example:
        >>> sentiment("it was not very good . it was never bad and stale .")
        1
    """
    total = 0
    for sentence in response.split("."):
        words = sentence.split()
        for i, word in enumerate(words):
            covering = sum(w in NEGATIONS for w in words[max(0, i - NEGATION_SCOPE) : i])
            total += ((word in POSITIVE) - (word in NEGATIVE)) * (-1) ** covering
    return total


def politeness(response: str) -> float:
    """Half a point for thanking and half a point for a please, however often they are said.

    Args:
        response: Words separated by spaces.

    Returns:
        0.0, 0.5 or 1.0.
    """
    return 0.5 * len(set(response.split()).intersection(COURTESIES))


def length_penalty(response: str) -> float:
    """The price of the words beyond the first `FREE_WORDS`, full stops included.

    Args:
        response: Words separated by spaces.

    Returns:
        A number >= 0 to subtract.
    """
    return WORD_PRICE * max(0, len(response.split()) - FREE_WORDS)


def is_grammatical(response: str) -> bool:
    """Says whether the grammar can write exactly this string. Measured beside the reward, never part of it.

    Args:
        response: The text to recognise; other spacing than single spaces is not part of the language.

    Returns:
        True for every string that `sample_response` may return, False for every other.
    """
    return _RESPONSE.fullmatch(response) is not None


def bradley_terry_ranking(rng: np.random.Generator, rewards: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Noisy scores whose order is a draw from the Plackett-Luce model on the rewards.

    Adding independent Gumbel noise of scale `temperature` gives exactly this model: the chance that response i comes
    first is softmax(rewards / temperature)_i, and so on among the rest. With two responses it is Bradley-Terry,
    P(1 above 2) = sigmoid((r1 - r2) / temperature). Only the order of the scores follows the model: their distances do
    not measure how sure a label is.

    Args:
        rng: A numpy generator.
        rewards: `[..., K]` finite gold rewards of the responses to one prompt along the last axis.
        temperature: Scale of the noise in units of the reward; 0 returns the rewards themselves.

    Returns:
        `[..., K]` float64 scores, higher is better.

    Raises:
        ValueError: If a reward or the temperature is not finite, or the temperature is negative.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    return rewards + temperature * rng.gumbel(size=rewards.shape)


def vocabulary() -> list[str]:
    """Lists every word of prompts and responses, punctuation marks included.

    Returns:
        The distinct words in alphabetical order; each is one token of a word-level tokenizer.
    """
    tables = (MOODS, OCCASIONS, DISHES, SITES, VENUES, POSITIVE, NEGATIVE, NEGATIONS, INTENSIFIERS)
    phrases = itertools.chain(*tables, SUBJECTS, VERBS, FILLERS, POLITE, ("a review of at the :", "and ."))
    return sorted({word for phrase in phrases for word in phrase.split()})


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _weighted(rng: np.random.Generator, options: dict[str, float]) -> str:
    # Inverse transform by hand: the order of the table and one uniform number decide, on every version of numpy.
    threshold = rng.random() * sum(options.values())
    for option, cumulative in zip(options, itertools.accumulate(options.values()), strict=True):
        if threshold < cumulative:
            return option
    return option


def _opinion(rng: np.random.Generator, pleased: bool) -> str:
    """A judgement: subject, verb, then one or two adjectives that share a negation and an intensifier."""
    words = [_choose(rng, SUBJECTS), _choose(rng, VERBS)]
    negated = rng.random() < NEGATED
    if negated:
        words.append(_choose(rng, NEGATIONS))
    if rng.random() < INTENSIFIED:
        words.append(_choose(rng, INTENSIFIERS))
    favourable = pleased == (rng.random() < AGREEMENT)
    words.append(_adjective(rng, favourable != negated))
    if rng.random() < COUPLED:
        same = rng.random() < AGREEMENT
        words += ["and", _adjective(rng, (favourable == same) != negated)]
    return " ".join(words)


def _adjective(rng: np.random.Generator, positive: bool) -> str:
    return _choose(rng, POSITIVE if positive else NEGATIVE)


def _response_pattern() -> re.Pattern[str]:
    """Compiles the recogniser from the sampler's tables."""

    def any_of(options: Sequence[str] | dict[str, float]) -> str:
        return f"(?:{'|'.join(re.escape(option) for option in options)})"

    adjective = any_of(POSITIVE + NEGATIVE)
    opinion = (
        f"{any_of(SUBJECTS)} {any_of(VERBS)} (?:{any_of(NEGATIONS)} )?(?:{any_of(INTENSIFIERS)} )?"
        f"{adjective}(?: and {adjective})?"
    )
    sentences = {"F": any_of(FILLERS), "O": opinion, "P": any_of(POLITE)}
    outlines = (" ".join(rf"{sentences[kind]} \." for kind in outline) for outline in OUTLINES)
    return re.compile("|".join(f"(?:{outline})" for outline in outlines))


_RESPONSE = _response_pattern()
