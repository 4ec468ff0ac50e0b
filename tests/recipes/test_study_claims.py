"""What is made of results: lines over seeds, the choice of settings, and the arithmetic of the claims by hand."""

import math

import numpy as np
import pytest

from palign.eval.winrate import Interval
from palign.recipes import study_claims as claims
from palign.recipes.study_claims import FAILS, HOLDS, MISSING, OPEN, all_claims, compare, verdict
from palign.recipes.study_config import Job, list_jobs
from palign.recipes.study_measures import Point, Rewards, correlations
from palign.recipes.study_summary import Entry, Outcomes, make_lines, over_optimisation, over_seeds, steps_to_best
from tests.recipes.study_runs import method, result, study

T = 4.302652729911275  # Student's 97.5% quantile at two degrees of freedom
SEEDS = (0, 1, 2)


def curve(*golds):
    return tuple(Point(10 * i, float(i), gold, 1.0) for i, gold in enumerate(golds))


def outcomes(config, make):
    """Every job of a study with the result that `make(job)` gives it; None leaves it out."""
    entries = [Entry(job, made, 1.0, 1.0) for job in list_jobs(config) if (made := make(job)) is not None]
    return Outcomes(config, entries)


def of_methods(**values):
    """Outcomes of methods at one setting: method -> what its result has, by seed."""
    names = {"dpo", "reverse", *values}
    config = study({name: method(label=name) for name in sorted(names)})
    return outcomes(config, lambda job: result(**values[job.method](job.seed)) if job.method in values else None)


def line_of(found, name):
    return next(line for line in make_lines(found) if line.name == name)


def test_convergence_is_read_between_checkpoints_from_a_runs_own_best():
    assert steps_to_best(curve(0.0, 0.5, 1.0)) == pytest.approx(18.0)
    assert steps_to_best(curve(1.0, 3.0, 2.0)) == pytest.approx(9.0)  # of the best, not of the last
    assert steps_to_best(curve(0.0, 1.0, 1.0)) == pytest.approx(9.0)
    assert steps_to_best(curve(1.0, 0.9, 1.0)) is None


def test_over_optimisation_is_what_is_lost_after_the_best_checkpoint():
    assert over_optimisation(curve(0.0, 3.0, 2.25)) == 0.75
    assert over_optimisation(curve(0.0, 1.0, 2.0)) == 0.0


def test_correlations_are_those_of_the_textbook_and_ties_share_a_rank():
    values, truth = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.0, 2.0, 8.0])
    pearson, spearman = correlations(values, truth)
    assert pearson == pytest.approx(np.corrcoef(values, truth)[0, 1], rel=1e-12)
    assert spearman == pytest.approx(np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1], rel=1e-12)


def test_intervals_over_seeds_are_students_and_a_single_seed_has_none():
    interval = over_seeds([1.0, 2.0, 3.0])
    assert interval[:2] == pytest.approx((2.0, 2.0 - T / math.sqrt(3))) and interval.n == 3
    assert over_seeds([0.1, 0.9], least=0, most=1)[1:3] == (0.0, 1.0)
    assert over_seeds([None, 2.0]) == Interval(2.0, -math.inf, math.inf, 1)
    assert over_seeds([None]) is None and over_seeds([]) is None


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(1.0, 0.5, 1.5, 3), HOLDS),
        (Interval(-1.0, -1.5, -0.5, 3), FAILS),
        (Interval(1.0, -0.5, 2.5, 3), OPEN),
        (Interval(1.0, 0.0, 2.0, 3), OPEN),
        (Interval(9.0, -math.inf, math.inf, 1), OPEN),  # one seed decides nothing
        (None, MISSING),
    ],
)
def test_a_verdict_is_no_stronger_than_its_interval(interval, expected):
    assert verdict(interval) == expected


def test_a_comparison_pairs_the_seeds_that_both_have():
    found = compare("x", {0: 3.0, 1: 5.0, 2: None, 3: 9.0}, {0: 1.0, 1: 2.0, 2: 0.0})
    assert (found.first.mean, found.second.mean, found.difference.mean, found.difference.n) == (4.0, 1.5, 2.5, 2)
    assert found.text.startswith("x: 4.00 against 1.50, difference 2.50 [") and found.text.endswith("over 2 seeds")
    assert compare("x", {0: 1.0}, {1: 1.0}).text == "x: not measured"
    assert "[" not in compare("x", {0: 1.0}, {0: 2.0}).text


def test_the_setting_that_is_shown_has_the_most_reward_on_the_tuning_prompts_not_on_the_test_ones():
    def made(job):
        beta = job.setting.get("beta", 0.5)
        on_test = {0.25: 9.0, 0.5: 1.0, 1.0: 2.0}[beta]
        return result(on_test, curve=curve(0.0, beta))

    found = outcomes(study(), made)
    line = line_of(found, "dpo")
    assert line.setting["beta"] == 1.0 and line.gold.mean == 2.0 and line.settings == 3
    assert (line.spread.mean, line.worst.mean) == (8.0, 1.0)
    assert line_of(found, "ipo").spread is None


def test_a_setting_without_all_seeds_is_not_chosen():
    config = study()
    found = outcomes(config, lambda job: None if job.folder.endswith("beta-1") and job.seed == 2 else result(
        5.0 if job.folder.endswith("beta-1") else 1.0))  # fmt: skip
    assert line_of(found, "dpo").setting["beta"] == 0.5 and line_of(found, "dpo").settings == 2


def test_until_every_grid_is_run_methods_are_compared_at_the_middle_of_theirs():
    config = study()
    entries = [Entry(job, result(job.setting.get("beta", 0.5)), 1.0, 1.0) for job in list_jobs(config)]
    whole, begun = Outcomes(config, entries), Outcomes(config, entries[:-1])
    assert (whole.is_whole, begun.is_whole) == (True, False)
    assert line_of(whole, "dpo").setting["beta"] == 1.0 and line_of(begun, "dpo").setting["beta"] == 0.5


def test_wins_are_counted_prompt_by_prompt_within_a_seed():
    golds = {"sft": (0, 0, 0, 0), "dpo": (1, 1, 1, 1), "ipo": (2, 1, 0, 0)}
    found = outcomes(study(), lambda job: result(gold=1.0)._replace(gold=golds.get(job.method, (1, 1, 1, 1))))
    line = line_of(found, "ipo")
    assert line.wins_over_sft.mean == pytest.approx(0.75) and line.wins_over_dpo.mean == pytest.approx(0.375)
    assert line_of(found, "sft").wins_over_sft is None and line_of(found, "dpo").wins_over_dpo is None


def test_runs_that_diverged_are_named_and_left_out():
    job = Job(0, "ipo", {"learning_rate": 1e-3}, "04-ipo")
    found = Outcomes(study(), [Entry(job, None, 1.0, 0.0)])
    assert found.diverged == ["seed-0/04-ipo"] and found.methods == []


def test_faster_convergence_compares_steps_to_each_runs_own_best():
    fast, slow = curve(0.0, 1.0, 1.0), curve(0.0, 0.5, 1.0)  # 9 and 18 steps
    claim = claims.faster_convergence(of_methods(dpo=lambda s: {"curve": slow}, aligndistil=lambda s: {"curve": fast}))
    assert claim.main.difference.mean == pytest.approx(9.0) and claim.verdict == HOLDS
    assert claim.others[0].difference is None


def test_the_lead_of_lists_is_taken_at_each_length_and_compared_between_the_ends():
    lipo = {"lipo_lambda_k2": 1.5, "lipo_lambda": 1.25, "lipo_lambda_k8": 1.25}
    golds = dict.fromkeys(("dpo_k2", "dpo", "dpo_k8"), 1.0) | lipo
    claim = claims.lists_gain_with_length(of_methods(**{n: lambda s, g=g: {"gold": g} for n, g in golds.items()}))
    assert claim.main.difference.mean == pytest.approx(-0.25) and claim.verdict == FAILS
    assert [f.difference.mean for f in claim.others] == pytest.approx([0.5, 0.25, 0.25])


def test_shorter_responses_are_counted_in_words():
    claim = claims.normalised_is_shorter(
        of_methods(dpo=lambda s: {"words": 15.0}, ln_dpo=lambda s: {"words": 15.0 - (-1) ** s})
    )
    assert claim.main.difference.mean == pytest.approx(1 / 3) and claim.verdict == OPEN


def test_the_adaptive_ratio_is_compared_with_constant_ones_in_reward_kl_and_grammar():
    claim = claims.adaptive_beats_constant(
        of_methods(
            aligndistil=lambda s: {"gold": 2.0, "kl": 5.0, "valid": 0.5},
            aligndistil_contrastive=lambda s: {"gold": 1.5, "kl": 4.0, "valid": 0.75},
        )
    )
    assert [f.difference.mean for f in (claim.main, *claim.others[:2])] == [0.5, -1.0, -0.25]
    assert (claim.verdict, claim.others[0].verdict, claim.others[2].verdict) == (HOLDS, FAILS, MISSING)


def test_over_optimisation_is_a_mean_over_the_grids():
    config = study({n: method(grid={"learning_rate": (1e-3,), "beta": (1.0, 2.0, 3.0)}) for n in ("dpo", "rpo")})
    lost = {"dpo": {1.0: 0.1, 2.0: 0.2, 3.0: 0.6}, "rpo": {1.0: 0.0, 2.0: 0.0, 3.0: 0.3}}
    found = outcomes(config, lambda job: result(
        over=lost[job.method][job.setting["beta"]]) if job.method in lost else None)  # fmt: skip
    claim = claims.rpo_over_optimises_less(found)
    assert (claim.main.first.mean, claim.main.second.mean) == pytest.approx((0.3, 0.1)) and claim.verdict == HOLDS


def test_the_ches_filter_is_compared_with_as_many_pairs_by_lot():
    claim = claims.ches_filter_displaces_less(
        of_methods(
            dpo=lambda s: {"chosen_change": 0.0},
            dpo_ches=lambda s: {"chosen_change": -1.0, "displaced": 0.25},
            dpo_random=lambda s: {"chosen_change": -3.0, "displaced": 0.75},
        )
    )
    assert claim.main.difference.mean == 2.0 and claim.verdict == HOLDS
    assert [f.difference.mean for f in claim.others] == [-1.0, 0.5, 0.0]


def test_observed_ranking_is_compared_with_the_idealised_one():
    four = {"idealised": 0.75, "idealised_certain": 1.0, "ranking": 0.5}
    claim = claims.observed_below_idealised(of_methods(dpo=lambda s: four))
    assert claim.main.difference.mean == 0.25 and claim.verdict == HOLDS and "K = 4" in claim.main.what
    assert claim.others[0].difference.mean == 0.5
    claim = claims.observed_below_idealised(of_methods(dpo=lambda s: four, dpo_k2=lambda s: four | {"ranking": 0.875}))
    assert claim.main.difference.mean == -0.125 and claim.others[1].difference.mean == 0.25


def test_the_contrastive_reward_is_compared_with_the_plain_one_in_accuracy_and_credit():
    claim = claims.contrastive_is_more_accurate(
        of_methods(
            dpo=lambda s: {"rewards": Rewards(0.75, 0.5, 0.5)},
            reverse=lambda s: {"contrastive": Rewards(0.5 + 0.125 * s, 0.625, 0.5)},
        )
    )
    assert claim.main.difference.mean == pytest.approx(-0.125) and claim.verdict == OPEN
    assert claim.others[0].difference.mean == pytest.approx(0.125) and claim.others[0].verdict == HOLDS


def test_without_results_every_claim_says_that_it_was_not_measured():
    found = all_claims(Outcomes(study(), []))
    assert len(found) == 8 and {claim.verdict for claim in found} == {MISSING}
