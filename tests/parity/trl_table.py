"""TRL's recorded losses, and what each of TRL's names is in palign's functions: what the tests beside this compare.

TRL sums over tokens and averages over the batch inside its trainers: those reductions are written out here, and so is
what TRL leaves out or does otherwise, which `test_trl_differences.py` shows one by one. `OUTSIDE` holds what has no
counterpart in palign. Ours is computed in float64 from TRL's float32 log-probabilities: what is left is TRL's rounding.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palign import losses

HERE = pathlib.Path(__file__).parent
PAIRS = 5


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


def close(actual, expected, rtol=1e-5):
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
    "sigmoid": on_sums(losses.dpo),  # whatever its label_smoothing
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
    "ld_alpha": lambda p, s: losses.ld_dpo(*p.shared_and_tail(), **hyper(s, alpha="ld_alpha")),
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
        return losses.cdpo(logps, jnp.zeros_like(logps), **hyper(s, label_smoothing="label_smoothing"))
    return losses.cpo(logps, jnp.zeros_like(logps[:, 0]), **hyper(s))


def simpo(averages, s):
    if "label_smoothing" in s:  # the margin as a handicap of the chosen response, then cDPO with a uniform reference
        handicap = jnp.array([[s["simpo_gamma"] / s["beta"], 0.0]])
        handicapped = averages - jnp.broadcast_to(handicap, averages.shape)
        return losses.cdpo(handicapped, jnp.zeros_like(averages), **hyper(s, label_smoothing="label_smoothing"))
    return losses.simpo(averages, **hyper(s, gamma="simpo_gamma"))


# From what the trainer's loss method is given, `[B, 2]`: sums, and averages for ipo, simpo and alphapo.
CPO = {
    "sigmoid": cpo,
    "hinge": lambda logps, s: losses.hinge(logps, jnp.zeros_like(logps), **hyper(s)),
    "ipo": lambda logps, s: losses.ipo(logps, jnp.zeros_like(logps), **hyper(s)),
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
