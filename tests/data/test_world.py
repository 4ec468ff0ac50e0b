"""The embedded world: rewards by hand, a grammar that recognises itself and little else, labels with the right odds."""

import doctest
import itertools
import math

import numpy as np
import pytest

from palign.data import world


@pytest.fixture(scope="module")
def sample() -> list[tuple[str, str]]:
    return world.corpus(np.random.default_rng(0), 4000)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0),
        ("it was good .", 1),
        ("it was bad and cold .", -2),
        ("it was not good .", -1),
        ("it was never bland .", 1),
        ("it was not very good and fresh .", -2),  # the scope reaches over both adjectives
        ("not a b c good", -1),  # the fourth word is still covered
        ("not a b c d good", 1),  # the fifth is not
        ("it was not . it was good .", 1),  # the scope ends with the sentence
        ("it was not never good .", 1),  # two negations cancel
        ("good not good", 0),  # a negation does not reach backwards
        ("thank you .", 0),
        ("goodness gracious", 0),  # whole words only
    ],
)
def test_sentiment_by_hand(response, expected):
    assert world.sentiment(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("it was good .", 0.0),
        ("thank you .", 0.5),
        ("please visit .", 0.5),
        ("thank you and please visit .", 1.0),
        ("thank thank thank please please", 1.0),
    ],
)
def test_politeness_by_hand(response, expected):
    assert world.politeness(response) == expected


def test_length_is_free_at_first_and_then_costs():
    assert world.length_penalty(" ".join("x" * 8)) == 0
    assert world.length_penalty(" ".join("x" * 9)) == pytest.approx(0.05)
    assert world.length_penalty(" ".join("x" * 28)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        ("it was good .", 2 * math.tanh(0.5)),
        ("it was not good .", -2 * math.tanh(0.5)),
        ("it was good and fresh . thank you .", 2 * math.tanh(1) + 0.5 - 0.05),
        ("it was good . thank you and please visit .", 2 * math.tanh(0.5) + 1 - 0.1),
        ("it was good and bad .", 0.0),
    ],
)
def test_gold_reward_by_hand(response, expected):
    assert world.gold_reward("any prompt", response) == pytest.approx(expected, abs=1e-12)


def test_gold_reward_saturates_and_leaves_room_beyond_the_grammar(sample):
    best = "it was good and great . it was good and great . thank you and please visit ."
    hack = "good great fresh warm thank please"
    assert world.is_grammatical(best) and not world.is_grammatical(hack)
    assert max(world.gold_reward(*pair) for pair in sample) <= world.gold_reward("", best) < 2.5
    assert 2.9 < world.gold_reward("", hack) < 3
    assert world.gold_reward("", " ".join(["good"] * 200)) < 0  # longer is not freely better


def test_corpus_starts_far_below_the_best_and_is_diverse(sample):
    gold = np.array([world.gold_reward(*pair) for pair in sample])
    lengths = np.array([len(response.split()) for _, response in sample])
    assert 0.05 < gold.mean() < 0.4
    assert 1 < gold.std() < 1.5
    assert (gold > 2).mean() < 0.05
    assert 9 < lengths.mean() < 14
    assert lengths.min() >= 4 and lengths.max() <= 24
    assert len({response for _, response in sample}) > 0.85 * len(sample)


def test_every_sample_is_grammatical(sample):
    assert all(world.is_grammatical(response) for _, response in sample)


def test_corruptions_are_not_grammatical(sample):
    rng = np.random.default_rng(1)
    words = [response.split() for _, response in sample[:1000]]
    shuffled = [" ".join(rng.permutation(w)) for w in words]
    assert np.mean([world.is_grammatical(s) for s in shuffled]) < 0.02
    assert not any(world.is_grammatical(" ".join(w[:-1])) for w in words)
    assert not any(world.is_grammatical(" ".join(w[1:])) for w in words if w[0] != "the")
    assert not any(world.is_grammatical(" ".join(w + w + w + w)) for w in words)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " ",
        "good .",
        "thank you .",  # politeness alone is no review
        "it was good",
        "it was good  .",
        "it was good .\n",
        " it was good .",
        "It was good .",
        "it was not never good .",
        "it was very not good .",
        "it was good and .",
        "it was good . thank .",
        "thank you . it was good .",
        "it was good . it was good . it was good .",
        "we ate outside . we ate outside . it was good .",
    ],
)
def test_near_misses_are_not_grammatical(response):
    assert not world.is_grammatical(response)


def test_recogniser_and_sampler_agree_on_the_single_opinion():
    """Every string of the outline "O" is recognised, and there are as many of them as the tables say."""
    adjectives = world.POSITIVE + world.NEGATIVE
    optional = [("", *world.NEGATIONS), ("", *world.INTENSIFIERS), adjectives, ("", *(f"and {a}" for a in adjectives))]
    parts = itertools.product(world.SUBJECTS, world.VERBS, *optional)
    texts = {" ".join(" ".join(p).split()) + " ." for p in parts}
    assert len(texts) == 5 * 2 * 3 * 4 * 14 * 15
    assert all(world.is_grammatical(text) for text in texts)


def test_prompts_are_distinct_and_short():
    prompts = world.all_prompts()
    assert len(prompts) == len(set(prompts)) == 2304
    assert {len(prompt.split()) for prompt in prompts} == {11}


def test_split_is_deterministic_disjoint_and_complete():
    train, heldout = world.split_prompts(3)
    assert (train, heldout) == world.split_prompts(3)
    assert heldout != world.split_prompts(4)[1]
    assert len(heldout) >= 500
    assert not set(train) & set(heldout)
    assert set(train) | set(heldout) == set(world.all_prompts())
    assert len(world.split_prompts(3, heldout=10)[1]) == 10
    for bad in (0, 2304):
        with pytest.raises(ValueError, match="heldout"):
            world.split_prompts(0, heldout=bad)


def test_sampled_prompts_repeat_only_when_all_were_seen():
    rng = np.random.default_rng(0)
    pool = world.all_prompts()[:10]
    assert len(set(world.sample_prompts(rng, 2304))) == 2304
    drawn = world.sample_prompts(rng, 25, pool)
    assert set(drawn[:10]) == set(drawn[10:20]) == set(pool)
    assert len(drawn) == 25
    assert world.sample_prompts(rng, 0, []) == []
    with pytest.raises(ValueError, match="cannot draw"):
        world.sample_prompts(rng, 1, [])


def test_same_seed_same_corpus():
    first, again, other = (world.corpus(np.random.default_rng(seed), 50) for seed in (5, 5, 6))
    assert first == again != other


def test_corpus_keeps_to_the_given_prompts():
    train, heldout = world.split_prompts(0)
    written = world.corpus(np.random.default_rng(0), 200, train)
    assert not {prompt for prompt, _ in written} & set(heldout)


def test_vocabulary_holds_every_word(sample):
    vocabulary = world.vocabulary()
    assert vocabulary == sorted(set(vocabulary))
    assert 60 <= len(vocabulary) <= 100
    used = {word for pair in sample for text in pair for word in text.split()}
    assert used == set(vocabulary)


def test_two_labels_follow_bradley_terry():
    rng = np.random.default_rng(0)
    for gap, temperature in [(0.0, 1.0), (1.0, 1.0), (1.5, 0.5), (2.0, 4.0)]:
        scores = world.bradley_terry_ranking(rng, np.tile([gap, 0.0], (40_000, 1)), temperature)
        expected = 1 / (1 + math.exp(-gap / temperature))
        assert np.mean(scores[:, 0] > scores[:, 1]) == pytest.approx(expected, abs=0.01)


def test_lists_follow_plackett_luce():
    rewards = np.array([1.0, 0.0, -0.5])
    scores = world.bradley_terry_ranking(np.random.default_rng(0), np.tile(rewards, (60_000, 1)))
    orders = np.argsort(-scores, axis=1)
    weights = np.exp(rewards)
    for order in itertools.permutations(range(3)):
        a, b, c = weights[list(order)]
        expected = a / (a + b + c) * b / (b + c)
        assert np.mean((orders == order).all(axis=1)) == pytest.approx(expected, abs=0.01)


def test_labels_without_noise_and_bad_input():
    rng = np.random.default_rng(0)
    rewards = [0.3, -1.0, 2.0]
    np.testing.assert_array_equal(world.bradley_terry_ranking(rng, rewards, 0.0), rewards)
    with pytest.raises(ValueError, match="finite"):
        world.bradley_terry_ranking(rng, [0.0, math.nan])
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            world.bradley_terry_ranking(rng, rewards, temperature)


def test_doctests():
    assert doctest.testmod(world).failed == 0
