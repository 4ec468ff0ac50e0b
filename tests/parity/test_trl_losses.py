"""Every loss of TRL 1.16 against palign's, values and gradients; `make_trl_losses.py` recorded TRL's side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.parity.trl_table import (
    DPO,
    FILES,
    KTO,
    LOSSES,
    ONLINE_DPO,
    OUTSIDE,
    PAIRS,
    REWARD,
    SFT,
    TPO,
    Singles,
    alignment,
    by_pair,
    cases_of,
    close,
    divergence,
    every_case,
    fixture,
    pairs,
    recorded,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_every_name_in_trl_s_source_is_in_the_table():
    for file, names in fixture()[0]["names"].items():
        assert file in FILES or (file, None) in OUTSIDE, file
        for name in names:
            assert name in LOSSES.get(FILES.get(file), {}) or (file, name) in OUTSIDE, (file, name)


def test_every_loss_in_the_table_is_trl_s_and_was_recorded():
    source = fixture()[0]["names"]
    assert set(FILES) | {file for file, _ in OUTSIDE} == set(source)
    assert {(c.trainer, c.name) for c in every_case()} == {(t, name) for t, names in LOSSES.items() for name in names}
    assert fixture()[0]["versions"]["trl"] == "1.16.0"


def check_value_and_gradient(loss, at, case, mask=True):
    """The mean over the batch and its gradient, in one pass.

    TRL's log-probabilities of prompts and padding are constants, zeros, whose gradients it computes and drops: `mask`.
    """
    value, gradient = jax.value_and_grad(lambda x: loss(x).mean())(jnp.asarray(at))
    close(value, case["loss"])
    close(gradient, np.where(mask, case["gradient"], 0.0))


def titled(trainer):
    """Parametrises a test with the cases of a trainer that TRL could run."""
    cases = [case for case in cases_of(trainer) if case.fails is None]
    return pytest.mark.parametrize("case", cases, ids=lambda c: f"{c.batch}{c.name}-{c.number}")


@titled("dpo")
def test_dpo_trainer(case):
    """Values, and gradients for every token: those of prompts and padding are 0."""
    data = pairs()
    loss = DPO[case.name]
    check_value_and_gradient(lambda p: loss(data._replace(policy=p), case.settings), data.policy, case, data.mask)


@titled("kto")
def test_kto_trainer(case):
    inputs = {k: recorded(f"{case.batch}kto_inputs/{k}") for k in ("policy_logps", "ref_logps", "label")}
    kl_logps = [recorded(f"{case.batch}kto_inputs/{k}_kl_logps").sum(1) for k in ("policy", "ref")]
    kl = losses.kto_kl(*map(jnp.asarray, kl_logps), jnp.ones(len(kl_logps[0]), bool))
    if case.name == "kto":
        close(kl, case["kl"])
    singles = Singles(*map(jnp.asarray, inputs.values()), kl)
    check_value_and_gradient(lambda p: KTO[case.name](singles._replace(policy=p), case.settings), singles.policy, case)


@pytest.mark.parametrize(
    "case", [*cases_of("cpo"), *cases_of("orpo")], ids=lambda c: f"{c.trainer}-{c.name}-{c.number}"
)
def test_cpo_and_orpo_trainers(case):
    """Each pair's value and gradient, from what TRL's own `cpo_loss` and `odds_ratio_loss` were given."""
    loss = functools.partial(LOSSES[case.trainer][case.name], s=case.settings)
    logps = jnp.asarray(case["logps"])
    averaged = case.name in ("ipo", "simpo", "alphapo", "orpo")
    close(logps, pairs().averages()[0] if averaged else pairs().sums()[0])
    values, pull_back = jax.vjp(loss, logps)
    close(values, case["pairs"])
    close(pull_back(jnp.ones_like(values))[0], case["gradient"])


@titled("tpo")
def test_tpo_trainer(case):
    """From logits, so that the shift and the mask are ours too; a third of the rows are gold responses."""
    group = "tpo_inputs" if case.settings["tpo_alpha"] else "tpo_pair_inputs"
    ids, mask = (jnp.asarray(recorded(f"{group}/{name}")) for name in ("input_ids", "completion_mask"))

    def loss(logits):
        sums = losses.dense.sequence_logps(logits, ids, mask)
        averages = losses.dense.average_logps(logits, ids, mask)
        pairs_of = (by_pair(x[: 2 * PAIRS]) for x in (sums, averages))
        gold = sums[2 * PAIRS :].sum() / jnp.maximum(mask[2 * PAIRS :].sum(), 1)
        return TPO[case.name](*pairs_of, jnp.tile(gold, PAIRS), case.settings)

    check_value_and_gradient(loss, recorded(f"{group}/logits"), case)


@titled("online_dpo")
def test_online_dpo_trainer(case):
    close(ONLINE_DPO[case.name](pairs(), case.settings).mean(), case["loss"])


@titled("reward")
def test_reward_trainer(case):
    rewards = recorded("reward_inputs/rewards")
    check_value_and_gradient(lambda r: REWARD[case.name](by_pair(r[:, 0]), case.settings), rewards, case)


@titled("sft")
def test_sft_trainer(case):
    """The mean over the tokens of all responses: a token's own loss, times its part in that mean."""
    mask = jnp.asarray(recorded("sft_inputs/mask"))

    def loss(logps):
        return jnp.where(mask, SFT[case.name](logps), 0.0).sum() / mask.sum()

    check_value_and_gradient(loss, recorded("sft_inputs/logps"), case, mask)


@pytest.mark.parametrize("case", cases_of("distillation"), ids=lambda c: f"{c.settings['beta']}")
def test_distillation_trainers(case):
    """The stable trainer's kernel with its gradient, and the copies of its formula in six other trainers."""
    student, teacher = (jnp.asarray(recorded(f"distillation_inputs/{name}")) for name in ("student", "teacher"))
    check_value_and_gradient(lambda z: divergence(z, teacher, case.settings), student, case)
    for function in case.settings["functions"]:
        close(divergence(student, teacher, case.settings), case[function])


def test_dense_helpers_give_trl_s_token_log_probabilities_and_wpo_s_alignment():
    names = ("policy_logits", "input_ids", "completion_mask")
    logits, ids, mask = (jnp.asarray(recorded(f"pairs/{name}")) for name in names)
    close(losses.dense.token_logps(logits, ids, mask)[:, 1:], recorded("pairs/policy_logps"))
    close(by_pair(losses.dense.alignment_logps(logits, ids, mask)), alignment())
    shared = losses.dense.shared_and_tail_logps(logits, ids, mask, jnp.tile(pairs().lengths.min(1), 2))
    for ours, theirs in zip(shared, pairs().shared_and_tail()[:2], strict=True):
        close(by_pair(ours), theirs)
