"""Where TRL 1.16 and palign differ under one name, or TRL with itself: each difference, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.parity.trl_table import PAIRS, alignment, cases_of, close, every_case, pairs, recorded, the_case

pytestmark = pytest.mark.usefixtures("float64")


def far(actual, expected, at_least=0.01):
    """Apart by more than `at_least`, relative: not a matter of rounding."""
    assert abs(float(actual) / float(expected) - 1) > at_least


def test_label_smoothing_has_no_effect_on_sigmoid_and_cdpo_differs():
    plain, smoothed = the_case("dpo", "sigmoid", beta=0.5), the_case("dpo", "sigmoid", beta=0.5, label_smoothing=0.2)
    assert plain["loss"] == smoothed["loss"]
    np.testing.assert_array_equal(plain["gradient"], smoothed["gradient"])
    far(losses.cdpo(*pairs().sums(), beta=0.5, label_smoothing=0.2).mean(), plain["loss"])
    # CPO and TPO smooth the same loss under the same name: there it is cDPO.
    far(
        the_case("cpo", "sigmoid", label_smoothing=0.2)["loss"],
        the_case("cpo", "sigmoid", beta=0.5, cpo_alpha=0.0)["loss"],
    )


@pytest.mark.parametrize("case", cases_of("dpo", "alpha_divergence"), ids=lambda c: str(c.settings))
def test_alpha_divergence_is_mirrored(case):
    """TRL's coefficient is 1 - alpha of the paper: equal at the mirrored value, and at the same one only at 1/2."""
    coefficient = case.settings["f_alpha_divergence_coef"]
    close(losses.f_dpo_alpha(*pairs().sums(), beta=0.1, alpha=1 - coefficient).mean(), case["loss"])
    same = losses.f_dpo_alpha(*pairs().sums(), beta=0.1, alpha=coefficient).mean()
    if coefficient == 0.5:
        close(same, case["loss"])
    else:
        far(same, case["loss"])


def test_alpha_divergence_ends_at_forward_kl_and_at_dpo():
    ends = {0.0: the_case("dpo", "forward_kl", beta=0.1), 1.0: the_case("dpo", "sigmoid", beta=0.1)}
    for coefficient, end in ends.items():
        close(the_case("dpo", "alpha_divergence", f_alpha_divergence_coef=coefficient)["loss"], end["loss"])


def test_wpo_s_weight_is_not_clamped():
    """Pairs more likely than sampled ones weigh 1 with us and their product with TRL, the others weigh the same."""
    case, product = the_case("dpo", "use_weighting", loss_type="sigmoid"), np.exp(np.asarray(alignment()).sum(1))
    above = product > 1
    assert 0 < above.sum() < PAIRS
    data = pairs()
    ours = jax.grad(lambda p: losses.wpo(*data._replace(policy=p).sums(), alignment(), beta=0.5).mean())(data.policy)
    ours, theirs = (np.asarray(g).reshape(2, PAIRS, -1) for g in (ours, case["gradient"]))
    theirs = np.where(data.mask.reshape(ours.shape), theirs, 0.0)
    close(ours[:, ~above], theirs[:, ~above])
    close(ours[:, above] * product[above][:, None], theirs[:, above])
    assert np.abs(theirs[:, above]).max() > 1.2 * np.abs(ours[:, above]).max()
    far(losses.wpo(*data.sums(), alignment(), beta=0.5).mean(), case["loss"])


def test_wpo_s_weight_cannot_be_put_on_every_loss():
    """TRL multiplies in place, which hinge's gradient and sft's expanded mean do not survive."""
    failing = {c.settings["loss_type"]: c.fails for c in every_case() if c.fails}
    assert set(failing) == {"hinge", "sft"}
    assert "inplace operation" in failing["hinge"]
    assert "single memory location" in failing["sft"]


def test_bco_pair_has_no_shift():
    """Equal at shift 0; the moving shift, here of one step, differs."""
    case = the_case("dpo", "bco_pair", beta=0.1)
    policy, ref = pairs().sums()
    state = losses.bco_shift_start()
    assert losses.bco_shift(state) == 0
    close(losses.bco_pair(policy, ref, jnp.zeros(()), beta=0.1).mean(), case["loss"])
    state = losses.bco_shift_update(state, (0.1 * (policy - ref)).sum(0), jnp.array([PAIRS, PAIRS]))
    shift = losses.bco_shift(state)
    close(shift, 0.05 * (policy - ref).mean(0).sum())
    far(losses.bco_pair(policy, ref, shift, beta=0.1).mean(), case["loss"])


def test_sft_is_a_mean_over_the_tokens_of_the_batch():
    """Not of the responses' means, not their sum as in RPO: long responses count more, and a micro-batch changes it."""
    case, (sums, ref), (averages, _) = the_case("dpo", "sft"), pairs().sums(), pairs().averages()
    assert case["loss"] == the_case("sft", "nll")["loss"]
    close(losses.nll(sums[:, 0]).sum() / pairs().lengths[:, 0].sum(), case["loss"])
    far(losses.nll(averages[:, 0]).mean(), case["loss"])
    far(losses.nll(sums[:, 0]).mean(), case["loss"])
    combined = the_case("dpo", "sigmoid+sft")
    eta = combined.settings["loss_weights"][1] / combined.settings["beta"]
    far(losses.rpo(sums, ref, beta=combined.settings["beta"], eta=eta).mean(), combined["loss"])


def test_ipo_averages_over_tokens_in_dpo_trainer_and_sums_in_online_dpo_trainer():
    offline, online = the_case("dpo", "ipo", beta=0.1), the_case("online_dpo", "ipo", beta=0.1)
    close(losses.ipo(*pairs().averages(), beta=0.1).mean(), offline["loss"])
    close(losses.ipo(*pairs().sums(), beta=0.1).mean(), online["loss"])
    far(online["loss"], offline["loss"], at_least=0.3)
    close(the_case("online_dpo", "sigmoid", beta=0.1)["loss"], the_case("dpo", "sigmoid", beta=0.1)["loss"])


@pytest.mark.parametrize("case", cases_of("cpo"), ids=lambda c: f"{c.name}-{c.number}")
def test_cpo_s_supervised_term_is_a_mean_over_the_tokens_of_the_batch(case):
    """In palign's `cpo` the caller passes it: TRL's is B / N times each response's sum, N tokens in all."""
    default = 0.0 if case.name == "alphapo" else 1.0
    alpha, (sums, _), (averages, _) = case.settings.get("cpo_alpha", default), pairs().sums(), pairs().averages()
    token_mean = PAIRS / pairs().lengths[:, 0].sum() * sums[:, 0]
    close(case["pairs"].mean() - alpha * token_mean.mean(), case["loss"])
    if alpha and case.name == "sigmoid":
        beta = case.settings["beta"]
        close(losses.cpo(sums, token_mean, beta=beta, alpha=alpha).mean(), case["loss"])
        far(losses.cpo(sums, averages[:, 0], beta=beta, alpha=alpha).mean(), case["loss"])
        far(losses.cpo(sums, sums[:, 0], beta=beta, alpha=alpha).mean(), case["loss"])


def test_simpo_by_its_name_alone_has_a_supervised_term_too():
    """`cpo_alpha` is 1 unless it is set to 0."""
    without = the_case("cpo", "simpo", beta=2.0, cpo_alpha=0.0)
    (default,) = [c for c in cases_of("cpo", "simpo") if "cpo_alpha" not in c.settings]
    close(default["loss"] - without["loss"], pairs().token_mean()[0])
    close(losses.simpo(pairs().averages()[0], beta=2.0, gamma=0.5).mean(), without["loss"])


def test_alphapo_by_its_name_alone_is_simpo():
    """`alpha` is 0 unless it is set."""
    default, shaped = the_case("cpo", "alphapo"), the_case("cpo", "alphapo", alpha=0.25)
    assert default["loss"] == the_case("cpo", "simpo", beta=2.0, cpo_alpha=0.0)["loss"]
    far(shaped["loss"], default["loss"])


@pytest.mark.parametrize("case", cases_of("orpo"), ids=lambda c: str(c.settings["beta"]))
def test_orpo_s_supervised_term_covers_the_prompt(case):
    """And is a mean over the batch's tokens, where palign's is each response's own mean."""
    ids, attended = jnp.asarray(recorded("pairs/input_ids"))[:PAIRS], recorded("pairs/attention_mask")[:PAIRS]
    logps = losses.dense.token_logps(jnp.asarray(recorded("pairs/policy_logits"))[:PAIRS], ids, jnp.asarray(attended))
    over_all = losses.nll(logps).sum() / attended[:, 1:].sum()
    close(over_all, case["nll"])
    averages = pairs().averages()[0]
    penalty = losses.orpo(averages, weight=case.settings["beta"]) + averages[:, 0]
    close(over_all + penalty.mean(), case["loss"])
    far(losses.orpo(averages, weight=case.settings["beta"]).mean(), case["loss"])
    far(pairs().token_mean()[0] + penalty.mean(), case["loss"])


def test_generalised_jsd_jumps_at_its_ends_and_scaled_jsd_does_not():
    """A hundredth from beta = 0 TRL's loss is about a hundredth of the KL that it is at 0. Ours has KLs by name."""
    losses_by_beta = {c.settings["beta"]: float(c["loss"]) for c in cases_of("distillation") if c.settings["functions"]}
    student, teacher = (jnp.asarray(recorded(f"distillation_inputs/{name}")) for name in ("student", "teacher"))
    for end, near, kl in ((0.0, 0.01, losses.forward_kl), (1.0, 0.9, losses.reverse_kl)):
        close(kl(student, teacher).mean(), losses_by_beta[end])
        assert losses_by_beta[end] > 5 * losses_by_beta[near]
        with pytest.raises(ValueError, match=r"^generalised_jsd: "):
            losses.generalised_jsd(student, teacher, beta=end)
        scaled = losses.scaled_jsd(student, teacher, beta=abs(end - 1e-6)).mean()
        np.testing.assert_allclose(scaled, losses_by_beta[end], rtol=1e-3)
    close(losses.scaled_jsd(student, teacher, beta=0.1).mean() * 0.09, losses_by_beta[0.1])


def test_sppo_hard_has_no_half_and_the_official_loss_has():
    case = the_case("dpo", "sppo_hard", beta=0.1)
    wins = jnp.broadcast_to(jnp.array([[1.0, 0.0]]), (PAIRS, 2))
    close(2 * losses.sppo(*pairs().sums(), wins, jnp.ones((PAIRS, 2), bool), beta=0.1).mean(), case["loss"])


def test_robust_without_noise_is_sigmoid():
    clean, plain = the_case("dpo", "robust", beta=0.5, label_smoothing=0.0), the_case("dpo", "sigmoid", beta=0.5)
    assert clean["loss"] == plain["loss"]


def test_ld_dpo_with_alpha_1_is_dpo():
    close(losses.dpo(*pairs().sums(), beta=0.3).mean(), the_case("dpo", "ld_alpha", ld_alpha=1.0)["loss"])
    far(losses.dpo(*pairs().sums(), beta=0.3).mean(), the_case("dpo", "ld_alpha", ld_alpha=0.0)["loss"])


def test_kto_s_reference_point_is_clamped_at_0_where_it_is_apo_zero():
    by_batch = {c.batch: c for c in cases_of("kto", "kto", beta=0.7)}
    anchored = {c.batch: c for c in cases_of("kto", "apo_zero_unpaired", beta=0.7)}
    for batch, case in by_batch.items():
        raw = (
            (recorded(f"{batch}kto_inputs/policy_kl_logps") - recorded(f"{batch}kto_inputs/ref_kl_logps")).sum(1).mean()
        )
        assert case["kl"] == (0 if batch != "swapped_" else pytest.approx(raw, rel=1e-6))
        if raw < 0:
            close(case["loss"], anchored[batch]["loss"])
        else:
            far(case["loss"], anchored[batch]["loss"])
