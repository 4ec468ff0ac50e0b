"""BCO's underlying-distribution matching: the classifier of prompts and the weights that follow from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.oracles import unpaired_losses as oracle

fit = jax.jit(losses.fit_prompt_classifier)


def prompts(seed, size, width, *, scale=1.0, offset=0.0):
    """Embeddings, a fifth or so of them desirable, told apart by the first coordinate but not entirely."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(0.0, 1.0, (size, width))
    desirable = embeddings[:, 0] + rng.normal(0.0, 0.5, size) > 0.9
    return np.float32(scale * embeddings + offset), desirable


@pytest.mark.parametrize(
    ("size", "width", "regularisation"), [(40, 3, 1.0), (40, 3, 0.1), (6, 9, 2.5)], ids=["plain", "weak", "wide"]
)
def test_the_prompt_classifier_is_the_oracle_s(size, width, regularisation, close):
    embeddings, desirable = prompts(16, size, width)
    assert 0 < desirable.sum() < size / 2
    kernel, bias = oracle.fit_prompt_classifier(np.float64(embeddings), desirable, regularisation)
    actual = fit(embeddings, desirable, regularisation=regularisation)
    close(actual.kernel, kernel, rtol=1e-5, atol=1e-5)
    close(actual.bias, bias, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        actual = fit(np.float64(embeddings), desirable, regularisation=regularisation)
        assert actual.kernel.dtype == actual.bias.dtype == jnp.float64
        close(actual.kernel, kernel, rtol=1e-7, atol=1e-7)
        close(actual.bias, bias, rtol=1e-7, atol=1e-7)


# Scales of raw embeddings; (17, 8) can barely be separated, which takes the largest logits, 400 and 1357.
LAYOUTS = {
    "unit": dict(),
    "small": dict(scale=0.01),
    "large": dict(scale=100.0),
    "huge": dict(scale=1000.0),
    "far_away": dict(scale=30.0, offset=1e3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("width", [8, 50], ids=["narrow", "wide"])
def test_the_newton_steps_arrive_in_float32(layout, width):
    embeddings, desirable = prompts(17, 40, width, **layout)
    classifier = fit(embeddings, desirable)
    parts = np.float64(classifier.kernel), float(classifier.bias)
    _, gradient = oracle.balanced_logistic(*parts, np.float64(embeddings), desirable, 1.0)
    # Residuals of 40 examples times their embeddings, each rounded to float32's seven digits.
    assert np.abs(gradient).max() < 2e-6 * len(desirable) * np.abs(embeddings).max()


def test_separable_prompts_are_told_apart_where_the_penalty_is_small():
    embeddings, _ = prompts(18, 40, 8)
    desirable = embeddings[:, 0] > 0.8
    for scale, mistakes in ((0.1, True), (1000.0, False)):
        classifier = fit(np.float32(scale) * embeddings, desirable)
        probability = np.asarray(losses.desirable_probability(classifier, np.float32(scale) * embeddings))
        assert ((probability > 0.5) != desirable).any() == mistakes


def test_the_prompt_classifier_is_scikit_learn_s(close):
    # Of LogisticRegression(class_weight="balanced", C=1 / regularisation, tol=1e-12, solver="newton-cholesky"), 1.7.2.
    fitted = {
        1.0: ([-0.20627578127829377, 0.1762918520047859, -0.6281811757049444], -0.5412538637366741),
        10.0: ([-0.05525563414944956, 0.08492528877859035, -0.15902728149065506], -0.23301255387469777),
    }
    i = np.arange(16.0)
    embeddings = np.stack([np.sin(1.7 * i), 3 * np.cos(0.9 * i) + 2, np.sin(0.3 * i * i)], axis=1)
    for regularisation, (kernel, bias) in fitted.items():
        with jax.enable_x64(True):
            classifier = losses.fit_prompt_classifier(
                embeddings, np.isin(i, [0, 5, 6, 10, 15]), regularisation=regularisation
            )
        close(classifier.kernel, kernel, rtol=1e-6, atol=1e-8)
        close(classifier.bias, bias, rtol=1e-6)


def test_rare_and_frequent_kinds_weigh_the_same(close):
    # Without information in the prompts both kinds are equally probable, however many there are of each.
    desirable = np.arange(20) < 3
    classifier = fit(np.zeros((20, 2), np.float32), desirable)
    close(losses.desirable_probability(classifier, np.zeros((1, 2), np.float32)), [0.5])
    # Each of the rare ones repeated is the same fit.
    embeddings, desirable = prompts(19, 20, 2)
    twice = np.concatenate([np.arange(20), np.flatnonzero(desirable)])
    plain = fit(embeddings, desirable, regularisation=2.0)
    share = len(twice) / 20
    again = fit(embeddings[twice], desirable[twice], regularisation=2.0 * share)
    close(again.kernel, plain.kernel, rtol=1e-5, atol=1e-5)


def test_moving_the_origin_of_the_embeddings_changes_no_probability(close):
    embeddings, desirable = prompts(20, 30, 4)
    embeddings = np.round(64 * embeddings) / 64  # so that float32 holds the moved ones too
    moved = embeddings + np.float32(4096)
    here, there = fit(embeddings, desirable), fit(moved, desirable)
    close(there.kernel, here.kernel, rtol=1e-5, atol=1e-5)
    # A logit is now a difference of numbers 4096 times as large, and has as many fewer digits.
    probabilities = losses.desirable_probability(there, moved)
    close(probabilities, losses.desirable_probability(here, embeddings), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [True, False])
def test_one_kind_of_prompts_alone_gives_a_finite_classifier(kind):
    embeddings, _ = prompts(21, 10, 3)
    classifier = fit(embeddings, np.full(10, kind))
    assert np.isfinite(classifier.kernel).all() and np.isfinite(classifier.bias)
    probability = np.asarray(losses.desirable_probability(classifier, embeddings))
    assert (probability > 0.999).all() if kind else (probability < 0.001).all()


def test_bf16_embeddings_are_fitted_in_f32():
    embeddings, desirable = prompts(22, 20, 3)
    classifier = fit(jnp.asarray(embeddings, jnp.bfloat16), desirable)
    assert classifier.kernel.dtype == jnp.float32
    assert losses.desirable_probability(classifier, jnp.asarray(embeddings, jnp.bfloat16)).dtype == jnp.float32


def test_matching_weighs_undesirable_prompts_by_their_odds(run, close):
    probability = np.array([0.0, 0.1, 0.4, 0.8, 0.9, 0.95, 1.0, 0.0, 0.7, 1.0], np.float32)
    desirable = np.arange(10) >= 7
    close(run(losses.udm_weights)(probability, desirable), oracle.udm_weights(probability, desirable), rtol=2e-6)
    limits = dict(low=0.25, high=2.0)
    close(losses.udm_weights(probability, desirable, **limits), oracle.udm_weights(probability, desirable, **limits))


def test_matched_undesirable_prompts_have_the_mean_of_the_desirable_ones():
    # Two groups of prompts: desirable responses come from group 1 in 3 of 4, undesirable ones in 1 of 4.
    group = np.array([0] * 10 + [1] * 30 + [0] * 30 + [1] * 10)
    desirable = np.arange(80) < 40
    odds = np.where(group, 3.0, 1 / 3)  # of being desirable, known here
    weights = np.asarray(losses.udm_weights(np.float32(odds / (1 + odds)), desirable, low=0.01))
    assert np.average(group[~desirable]) == 0.25
    np.testing.assert_allclose(np.average(group[~desirable], weights=weights[~desirable]), 0.75, rtol=1e-5)


def test_no_gradient_flows_through_the_matching():
    embeddings, desirable = prompts(23, 12, 3)

    def through(embeddings):
        classifier = fit(embeddings, desirable)
        return losses.udm_weights(losses.desirable_probability(classifier, embeddings), desirable, low=0.01).sum()

    assert not np.any(jax.grad(through)(embeddings))


def test_wrong_arguments_are_answered_with_their_name():
    good = jnp.ones(3, bool)
    with pytest.raises(ValueError, match=r"fit_prompt_classifier: embeddings has shape \[3\]; expected \[N, D\]"):
        losses.fit_prompt_classifier(jnp.zeros(3), good)
    with pytest.raises(ValueError, match=r"fit_prompt_classifier: desirable has shape \[3\]; expected \[4\]"):
        losses.fit_prompt_classifier(jnp.zeros((4, 2)), good)
    with pytest.raises(ValueError, match="fit_prompt_classifier: regularisation is 0"):
        losses.fit_prompt_classifier(jnp.zeros((3, 2)), good, regularisation=0.0)
    classifier = losses.PromptClassifier(jnp.zeros(2), jnp.float32(0))
    with pytest.raises(ValueError, match="desirable_probability: embeddings have 5 dimensions"):
        losses.desirable_probability(classifier, jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"udm_weights: probability has shape \[3, 1\]"):
        losses.udm_weights(jnp.zeros((3, 1)), good)
    with pytest.raises(ValueError, match=r"udm_weights: all shapes must be equal, .* desirable \[3\]"):
        losses.udm_weights(jnp.zeros(4), good)
    with pytest.raises(ValueError, match=r"udm_weights: low is 3\.0 and high is 2\.0"):
        losses.udm_weights(jnp.zeros(3), good, low=3.0, high=2.0)
