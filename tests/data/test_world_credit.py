"""Credit of tokens in the embedded world: by hand, against the writer itself, and what must add up."""

import doctest
import math

import numpy as np
import pytest

from palign.data import world, world_credit
from palign.data.world_credit import expected_gold, token_credit

CALM = "a calm lunch review of soup at the corner cafe :"


@pytest.fixture(scope="module")
def sample():
    """Reviews by the writer itself, of one mood."""
    rng = np.random.default_rng(0)
    return [world.sample_response(rng, CALM) for _ in range(20_000)]


@pytest.mark.parametrize("kind", "FOP")
@pytest.mark.parametrize("pleased", [True, False])
def test_the_chances_of_all_sentences_of_a_kind_sum_to_one_and_none_is_listed_twice(kind, pleased):
    every = world_credit._sentences(kind, pleased)
    assert every.chance.sum() == pytest.approx(1, abs=1e-12) and every.chance.min() > 0
    assert len(set(every.texts)) == len(every.texts) and every.texts == sorted(every.texts)


def test_opinions_have_the_chances_that_their_productions_multiply_to():
    every = world_credit._sentences("O", True)
    chance = dict(zip(every.texts, every.chance, strict=True))
    opening = 1 / (len(world.SUBJECTS) * len(world.VERBS))
    # not negated, no intensifier, favourable, one adjective
    assert chance["it was good ."] == pytest.approx(opening * 0.7 * 0.7 * 0.8 / 7 * 0.6)
    # "not" of two negations, "very" of three intensifiers, favourable by a negative word
    assert chance["it was not very bad ."] == pytest.approx(opening * 0.3 / 2 * 0.3 / 3 * 0.8 / 7 * 0.6)
    # unfavourable, then a favourable one that does not agree with it
    assert chance["it was bad and good ."] == pytest.approx(opening * 0.7 * 0.7 * 0.2 / 7 * 0.4 * 0.2 / 7)


def test_the_expected_gold_of_an_empty_page_and_of_beginnings_is_what_the_writer_earns_on_average(sample):
    for written in ("", "it", "we came", "the food was not", "it was good", "we came outside ."):
        begun = [r for r in sample if not written or f"{r} ".startswith(f"{written} ")]
        gold = np.asarray([world.gold_reward(CALM, r) for r in begun])
        error = gold.std() / math.sqrt(len(gold))
        assert len(gold) > 20 and abs(gold.mean() - expected_gold(CALM, written)) < 4 * error, written


def test_what_is_certain_is_expected_exactly():
    # After a third sentence nothing can follow, and in it nothing is left to choose.
    review = "we came outside . it was good . thank you all ."
    assert expected_gold(CALM, review) == pytest.approx(world.gold_reward(CALM, review), abs=1e-12)
    assert expected_gold(CALM, "we came outside . it was good . thank you all") == pytest.approx(
        world.gold_reward(CALM, review), abs=1e-12
    )
    assert token_credit(CALM, review)[-3:] == pytest.approx([expected_gold(CALM, review) - expected_gold(
        CALM, "we came outside . it was good . thank you"), 0, 0], abs=1e-12)  # fmt: skip


def test_a_beginning_is_worth_the_mean_of_what_it_may_go_on_with(sample):
    """E[gold | written] = sum over next words of their chance, from the writer's sample, times E[gold | with it]."""
    begun = [r for r in sample if r.startswith("it was ")]
    nexts = [r.split()[2] for r in begun]
    mean = np.mean([expected_gold(CALM, f"it was {word}") for word in nexts])
    assert mean == pytest.approx(expected_gold(CALM, "it was"), abs=0.05)


def test_credits_sum_to_the_gold_reward_less_what_was_expected_of_it(sample):
    for review in sample[:200]:
        credit = token_credit(CALM, review)
        assert credit.shape == (len(review.split()) + 1,)
        assert credit.sum() == pytest.approx(world.gold_reward(CALM, review) - expected_gold(CALM, ""), abs=1e-9)


def test_good_words_earn_bad_words_cost_and_a_negation_turns_them():
    good, bad = token_credit(CALM, "it was good ."), token_credit(CALM, "it was bad .")
    assert good[2] > 0.5 and bad[2] < -0.5
    turned = token_credit(CALM, "it was not good .")
    assert turned[3] < -0.5 and token_credit(CALM, "it was not bad .")[3] > 0.5
    assert abs(turned[2]) < 0.1  # "not" alone says little: what follows is as likely to be good or bad
    assert token_credit(CALM, "it was good . thank you .")[4] > 0.3


def test_the_mood_of_the_prompt_matters_and_none_counts_as_calm():
    values = [expected_gold(f"a {mood} day", "") for mood in world.MOODS]
    assert values == sorted(values, reverse=True) and len(set(values)) == 4
    assert expected_gold("no mood", "it was") == expected_gold(CALM, "it was")


@pytest.mark.parametrize("response", ["", "it was good", "good good good", "it was good . it was good . it was good ."])
def test_what_is_no_review_has_no_credit(response):
    with pytest.raises(ValueError, match="no review of this world"):
        token_credit(CALM, response)


@pytest.mark.parametrize("written", ["good", "it was good and .", "it was good . bad", "thank you ."])
def test_what_no_review_begins_with_has_no_expectation(written):
    with pytest.raises(ValueError, match=f"no review of this world begins with '{written}'"):
        expected_gold(CALM, written)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(world_credit).failed == 0
