"""Every loss of TRL 1.16 against palign's: values and gradients where they agree, and by how much where they do not.

`make_trl_losses.py` recorded TRL's side. `LOSSES` says what each of TRL's names is in palign's functions. TRL sums over
tokens and averages over the batch inside its trainers: those reductions are written out here, and so is what TRL leaves
out or does otherwise. The tests after the table's show each such difference. `OUTSIDE` holds what palign does not have.

Ours is computed in float64 from TRL's float32 log-probabilities: what is left is TRL's rounding.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses

HERE = pathlib.Path(__file__).parent
PAIRS = 5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def fixture():
    with np.load(HERE / "trl_losses.npz") as file:
        arrays = {name: np.float64(x) if x.dtype == np.float32 else x for name, x in file.items()}
    return json.loads((HERE / "trl_losses.json").read_text()), arrays


def recorded(name: str) -> np.ndarray:
    return fixture()[1][name]


class Case(NamedTuple):
    """One call of TRL's: its trainer, the batch it was given, the name of its loss here, its settings."""

    trainer: str
    batch: str
    number: int
    name: str
    settings: dict
    fails: str | None

    def __getitem__(self, array: str) -> np.ndarray:
        return recorded(f"{self.batch}{self.trainer}/{self.number}/{array}")


def loss_name(settings: dict) -> str:
    """TRL's name of the loss: an option that changes it goes before `loss_type`."""
    for option in ("use_weighting", "ld_alpha", "margin", "center_rewards_coefficient"):
        if option in settings:
            return option
    name = settings.get("f_divergence_type", settings.get("loss_type", "plain"))
    return name if isinstance(name, str) else "+".join(name)


def every_case() -> list[Case]:
    cases = []
    for case in fixture()[0]["cases"]:
        *batch, trainer = case["trainer"].split("_", 1) if case["trainer"].endswith("_kto") else [case["trainer"]]
        prefix = f"{batch[0]}_" if batch else ""
        cases.append(
            Case(trainer, prefix, case["number"], loss_name(case["settings"]), case["settings"], case["fails"])
        )
    return cases


def cases_of(trainer: str, name: str | None = None, **settings) -> list[Case]:
    """Recorded cases of a trainer, of one loss, whose settings are among others these."""
    found = [c for c in every_case() if c.trainer == trainer and name in (None, c.name)]
    return [c for c in found if settings.items() <= c.settings.items()]


def the_case(trainer: str, name: str, **settings) -> Case:
    """The first such case: the fixture lists the plainest first."""
    return cases_of(trainer, name, **settings)[0]


def close(actual, expected, rtol=2e-6):
    """Within TRL's rounding; gradients that cancel have their absolute floor from the largest one."""
    floor = 1e-6 * float(np.max(np.abs(expected), initial=0.0))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=floor)


def by_pair(responses):
    """`[2B]`, the chosen ones first as TRL lays them out, to `[B, 2]`."""
    return jnp.asarray(responses).reshape(2, -1).T


class Pairs(NamedTuple):
    """Token log-probabilities `[2B, S]` under both models, and what the losses make of them."""

    policy: jax.Array
    ref: jax.Array
    mask: jax.Array

    @property
    def lengths(self):
        return by_pair(self.mask.sum(1))

    def sums(self):
        return [by_pair(jnp.where(self.mask, logps, 0.0).sum(1)) for logps in (self.policy, self.ref)]

    def averages(self):
        return [sums / self.lengths.astype(sums.dtype) for sums in self.sums()]

    def shared_and_tail(self):
        """For both models the sums over as many tokens as the shorter response of the pair has, and over the rest."""
        place = jnp.cumsum(self.mask, axis=1)
        shared = self.mask & (place <= jnp.tile(self.lengths.min(1), 2)[:, None])
        masks = (shared, self.mask & ~shared)
        return [by_pair(jnp.where(m, logps, 0.0).sum(1)) for logps in (self.policy, self.ref) for m in masks]

    def token_mean(self):
        """The mean NLL over all tokens of all chosen responses, once for each pair."""
        chosen, mask = self.policy[:PAIRS], self.mask[:PAIRS]
        return jnp.tile(jnp.where(mask, losses.nll(chosen), 0.0).sum() / mask.sum(), PAIRS)


def pairs() -> Pairs:
    names = ("pairs/policy_logps", "pairs/ref_logps")
    return Pairs(
        *(jnp.asarray(recorded(name)) for name in names), jnp.asarray(recorded("pairs/completion_mask")[:, 1:])
    )


def alignment():
    """WPO's `[B, 2]`, from TRL's log-probabilities and TRL's sums of squares."""
    data = pairs()
    over = jnp.where(data.mask, data.policy - jnp.asarray(recorded("pairs/log_sum_sq_probs")), 0.0)
    return by_pair(over.sum(1) / data.mask.sum(1))


def zeros_like(logps):
    return jnp.zeros_like(logps)


def hyper(settings, **names):
    """palign's keyword -> TRL's setting, beta among them."""
    return {ours: settings[theirs] for ours, theirs in ({"beta": "beta"} | names).items() if theirs in settings}


def on_sums(loss, **names):
    return lambda p, s: loss(*p.sums(), **hyper(s, **names))


def weighted(p, s):
    """TRL's weight has no clamp, and multiplies whichever loss it is given."""
    unclamped = jnp.maximum(jnp.exp(alignment().sum(1)), 1.0)
    if s["loss_type"] == "ipo":
        return unclamped * losses.wpo_weights(alignment()) * losses.ipo(*p.averages(), **hyper(s))
    return unclamped * losses.wpo(*p.sums(), alignment(), **hyper(s))


def aot(p, s):
    policy, ref = p.sums()
    matched = losses.aot_matched_margins(policy, ref, jnp.ones(PAIRS, bool))
    return losses.aot(policy, matched, **hyper(s, label_smoothing="label_smoothing"))


def aot_unpaired(p, s):
    matched = losses.aot_matched_ratios(*p.sums(), jnp.ones(PAIRS, bool))
    return losses.aot_unpaired(*p.sums(), matched, **hyper(s, label_smoothing="label_smoothing"))


# What each loss of DPOTrainer is, from token log-probabilities: one value per pair, TRL reports the mean.
DPO = {
    "sigmoid": on_sums(losses.dpo),  # without label_smoothing, see test_label_smoothing_...
    "sigmoid+sft": lambda p, s: losses.dpo(*p.sums(), **hyper(s)) + s["loss_weights"][1] * p.token_mean(),
    "sft": lambda p, s: p.token_mean(),
    "hinge": on_sums(losses.hinge),
    "ipo": lambda p, s: losses.ipo(*p.averages(), **hyper(s)),
    "sigmoid_norm": lambda p, s: losses.ln_dpo(*p.sums(), p.lengths, **hyper(s)),
    "exo_pair": on_sums(losses.exo_pair, label_smoothing="label_smoothing"),
    "robust": on_sums(losses.robust_dpo, label_smoothing="label_smoothing"),
    "nca_pair": on_sums(losses.nca_pair),
    "bco_pair": lambda p, s: losses.bco_pair(*p.sums(), jnp.zeros(()), **hyper(s)),
    "apo_zero": on_sums(losses.apo_zero),
    "apo_down": on_sums(losses.apo_down),
    "sppo_hard": on_sums(losses.sppo_hard),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "discopop": on_sums(losses.discopop, temperature="discopop_tau"),
    "reverse_kl": on_sums(losses.dpo),
    "forward_kl": on_sums(losses.f_dpo_forward_kl),
    "js_divergence": on_sums(losses.f_dpo_js),
    "alpha_divergence": lambda p, s: losses.f_dpo_alpha(*p.sums(), **hyper(s), alpha=1 - s["f_alpha_divergence_coef"]),
    "ld_alpha": lambda p, s: losses.ld_dpo(
        *(p.shared_and_tail()[i] for i in (0, 1, 2, 3)), **hyper(s, alpha="ld_alpha")
    ),
    "use_weighting": weighted,
}


class Singles(NamedTuple):
    """KTO's batch: token log-probabilities `[N, S]`, the labels, and the reference point from mismatched responses."""

    policy: jax.Array
    ref: jax.Array
    label: jax.Array
    kl: jax.Array


def kto(x, s):
    weights = hyper(s, desirable_weight="desirable_weight", undesirable_weight="undesirable_weight")
    return losses.kto(x.policy.sum(1), x.ref.sum(1), x.label, x.kl, **weights)


KTO = {
    "kto": kto,
    "apo_zero_unpaired": lambda x, s: losses.apo_zero_unpaired(x.policy.sum(1), x.ref.sum(1), x.label, **hyper(s)),
}


def cpo(logps, s):
    if "label_smoothing" in s:  # cDPO with a uniform reference
        return losses.cdpo(logps, zeros_like(logps), **hyper(s, label_smoothing="label_smoothing"))
    return losses.cpo(logps, zeros_like(logps[:, 0]), **hyper(s))


def simpo(averages, s):
    if "label_smoothing" in s:  # the margin as a handicap of the chosen response, then cDPO with a uniform reference
        handicap = jnp.array([[s["simpo_gamma"] / s["beta"], 0.0]])
        handicapped = averages - jnp.broadcast_to(handicap, averages.shape)
        return losses.cdpo(handicapped, zeros_like(averages), **hyper(s, label_smoothing="label_smoothing"))
    return losses.simpo(averages, **hyper(s, gamma="simpo_gamma"))


# From what the trainer's loss method is given, `[B, 2]`: sums, and averages for ipo, simpo and alphapo.
CPO = {
    "sigmoid": cpo,
    "hinge": lambda logps, s: losses.hinge(logps, zeros_like(logps), **hyper(s)),
    "ipo": lambda logps, s: losses.ipo(logps, zeros_like(logps), **hyper(s)),
    "simpo": simpo,
    "alphapo": lambda logps, s: losses.alphapo(logps, **hyper(s, gamma="simpo_gamma"), alpha=s.get("alpha", 0.0)),
}
# TRL's method returns the penalty alone, times -1: our loss without its supervised term.
ORPO = {"orpo": lambda logps, s: -logps[:, 0] - losses.orpo(logps, weight=s["beta"])}
# From sums, averages, and the gold responses' token mean in the place of CPO's supervised term.
TPO = {
    "sigmoid": lambda sums, averages, gold, s: losses.cpo(sums, gold, **hyper(s, alpha="tpo_alpha")),
    "hinge": lambda sums, averages, gold, s: CPO["hinge"](sums, s) - s["tpo_alpha"] * gold,
    "ipo": lambda sums, averages, gold, s: CPO["ipo"](averages, s) - s["tpo_alpha"] * gold,
    "tpo-l": lambda sums, averages, gold, s: losses.simpo(averages, **hyper(s), gamma=0.5) - s["tpo_alpha"] * gold,
}
ONLINE_DPO = {"sigmoid": on_sums(losses.dpo), "ipo": on_sums(losses.ipo)}
REWARD = {
    "plain": lambda rewards, s: losses.bradley_terry(rewards),
    "margin": lambda rewards, s: losses.bradley_terry_margin(rewards, jnp.asarray(recorded("reward_inputs/margins"))),
    "center_rewards_coefficient": lambda rewards, s: losses.bradley_terry_centred(
        rewards, coefficient=s["center_rewards_coefficient"]
    ),
}
SFT = {"nll": losses.nll, "chunked_nll": losses.nll, "dft": losses.dft}


def divergence(student, teacher, s):
    """TRL's generalised JSD of beta: a KL at both ends."""
    student, teacher = student / s["temperature"], teacher / s["temperature"]
    ends = {0.0: losses.forward_kl, 1.0: losses.reverse_kl}
    if s["beta"] in ends:
        return ends[s["beta"]](student, teacher)
    return losses.generalised_jsd(student, teacher, beta=s["beta"])


LOSSES = {
    "dpo": DPO,
    "kto": KTO,
    "cpo": CPO,
    "orpo": ORPO,
    "tpo": TPO,
    "online_dpo": ONLINE_DPO,
    "reward": REWARD,
    "sft": SFT,
    "distillation": {"plain": divergence},
}
# File of TRL's that compares names of losses, or holds a trainer -> the trainer above.
FILES = {
    "trainer/dpo_trainer.py": "dpo",
    "trainer/kto_trainer.py": "kto",
    "trainer/reward_trainer.py": "reward",
    "trainer/sft_config.py": "sft",
    "trainer/sft_trainer.py": "sft",
    "trainer/distillation_trainer.py": "distillation",
    "experimental/cpo/cpo_config.py": "cpo",
    "experimental/cpo/cpo_trainer.py": "cpo",
    "experimental/orpo/orpo_trainer.py": "orpo",
    "experimental/tpo/tpo_trainer.py": "tpo",
    "experimental/online_dpo/online_dpo_trainer.py": "online_dpo",
    "experimental/gkd/gkd_trainer.py": "distillation",
    "experimental/gold/gold_trainer.py": "distillation",
    "experimental/iw_opd/iw_opd_trainer.py": "distillation",
    "experimental/sdft/sdft_trainer.py": "distillation",
    "experimental/sdpo/sdpo_trainer.py": "distillation",
    "experimental/server_distillation/server_distillation_trainer.py": "distillation",
}
POLICY_GRADIENT = {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"}
# What palign has no counterpart of, and why.
OUTSIDE = {
    ("experimental/cpo/cpo_trainer.py", "kto_pair"): "TRL raises: removed there",
    **{("trainer/grpo_trainer.py", name): "a policy gradient" for name in POLICY_GRADIENT},
    **{("experimental/sdpo/sdpo_trainer.py", name): "a policy gradient" for name in POLICY_GRADIENT},
    ("trainer/grpo_trainer.py", None): "a policy gradient",
    ("trainer/rloo_trainer.py", None): "a policy gradient",
    ("trainer/base_trainer.py", None): "no loss",
    ("experimental/a2po/a2po_trainer.py", None): "regression on online rewards",
    ("experimental/async_distillation/async_distillation_trainer.py", None): "a divergence over top-k tokens",
    ("experimental/async_grpo/async_grpo_trainer.py", None): "a policy gradient",
    ("experimental/bema_for_ref_model/dpo_trainer.py", None): "DPOTrainer with another reference",
    ("experimental/gmpo/gmpo_trainer.py", None): "a policy gradient",
}


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
    """A hundredth from beta = 0 TRL's loss is about a hundredth of the KL that it becomes at 0. Ours has KLs by name."""
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
    assert the_case("dpo", "robust", label_smoothing=0.0)["loss"] == the_case("dpo", "sigmoid", beta=0.5)["loss"]


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
