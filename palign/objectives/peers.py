"""The losses of other libraries by their names, and what each is here.

A difference is one sentence: what a user of that library would see change. `docs/switching.md` is made of this module:

    python -m palign.objectives.peers > docs/switching.md
"""

from collections.abc import Mapping
from typing import NamedTuple


class Version(NamedTuple):
    """What was read of a library."""

    release: str
    read: str  # commit and its date


class PeerLoss(NamedTuple):
    """A loss of another library.

    `ours` is a name in `palign.objectives.registry.METHODS`, a function as `losses.NAME`, or several of them
    joined by " + ".
    """

    peer: str
    trainer: str
    name: str
    ours: str
    difference: str = ""  # one sentence; "" = equal


VERSIONS: dict[str, Version] = {
    "TRL": Version("1.16.0", "documentation and tests at f2cd5771 (2026-07-24)"),
    "tunix": Version("0.1.7", "c7d8950 (2026-08-21)"),
    "EasyDeL": Version("0.3.0", "090a03b (2026-04-22)"),
    "HALOs": Version("no release", "its losses only, no commit noted"),
    "OpenRLHF": Version("0.11.2", "3c3be623 (2026-08-13)"),
}

Rows = Mapping[str, tuple[str, str]]  # their name -> ours, difference

SORTED_BATCH = "Sorts the batch of one device there, the global batch here."
SUPERVISED = "Adds `cpo_alpha` (1 by default) times the NLL, a mean over the tokens of the batch"

TRL_DPO: Rows = {
    "sigmoid": ("dpo", "Ignores `label_smoothing` there; with it the loss is `cdpo`."),
    "hinge": ("hinge", ""),
    "ipo": ("ipo", ""),
    "exo_pair": ("exo_pair", "`label_smoothing` must be set there, it is 0.001 by default here."),
    "nca_pair": ("nca_pair", ""),
    "robust": ("robust_dpo", "`label_smoothing` is 0 by default there (then it is `dpo`), 0.1 here."),
    "bco_pair": ("bco_pair", "The shift is always 0 there, a running mean of the rewards here."),
    "sppo_hard": ("sppo_hard", "Equal, without the authors' factor 1/2; `beta` is 0.1 by default there, 0.001 here."),
    "aot": ("aot", SORTED_BATCH),
    "aot_unpaired": ("aot_unpaired", SORTED_BATCH),
    "apo_zero": ("apo_zero", ""),
    "apo_down": ("apo_down", ""),
    "discopop": (
        "discopop",
        "Its exponential is not clamped there; `discopop_tau` is `temperature`, and `beta` is 0.1 by default there, "
        "0.05 here.",
    ),
    "sft": ("sft", "A mean over the tokens of a micro-batch there, of the global batch here."),
    "sigmoid_norm": ("ln_dpo", "`beta` is 0.1 by default there, 5 here."),
    "[sigmoid, sft]": ("dpo + sft", "`loss_weights` are the same; the mean of `sft` is over the global batch here."),
    "f_divergence_type=reverse_kl": ("dpo", ""),
    "f_divergence_type=forward_kl": ("f_dpo_forward_kl", "Its exponentials are not clamped there."),
    "f_divergence_type=js_divergence": ("f_dpo_js", ""),
    "f_divergence_type=alpha_divergence": (
        "f_dpo_alpha",
        "`f_alpha_divergence_coef` is 1 - `alpha`: mirrored, equal at 1/2 only.",
    ),
    "use_weighting": ("wpo", "The weight is not clamped at 1 there; here it goes with `dpo` only."),
    "ld_alpha": ("ld_dpo", "`ld_alpha` is `alpha`."),
}

TRL_CPO: Rows = {
    "sigmoid": ("cpo", "`cpo_alpha` is `alpha`; the NLL is a mean over the tokens of the batch there, a pair's here."),
    "hinge": (
        "slic_hf",
        f"{SUPERVISED}; its margin is `beta` times that of `slic_hf` with `delta` = 1 / `beta`.",
    ),
    "ipo": ("losses.ipo", f"{SUPERVISED}; take it with means over tokens and reference log-probabilities of 0."),
    "simpo": (
        "simpo",
        f"{SUPERVISED}: set it to 0; `simpo_gamma` (0.5) is `gamma` (1), and `beta` is 0.1 there, 2 here.",
    ),
    "alphapo": (
        "alphapo",
        f"{SUPERVISED}; `alpha` is 0 by default there, which is SimPO, and exp(logp)^(-alpha) can underflow.",
    ),
}

GOLD_NLL = "Adds `tpo_alpha` times the NLL of a third, gold response, which is not here"

TRL_TPO: Rows = {
    "sigmoid": ("cpo", f"{GOLD_NLL}; `alpha` = 0 leaves the rest."),
    "hinge": ("losses.hinge", f"{GOLD_NLL}; take it with reference log-probabilities of 0."),
    "ipo": ("losses.ipo", f"{GOLD_NLL}; take it with means over tokens and reference log-probabilities of 0."),
    "tpo-l": ("simpo", f"{GOLD_NLL}; with `gamma` = 0.5 by default."),
}

JSD_ENDS = "Is a KL at `beta` 0 and 1 there (here `forward_kl`, `reverse_kl`, or `scaled_jsd` up to both)"

TRL: dict[str, Rows] = {
    "DPOTrainer": TRL_DPO,
    "KTOTrainer": {"kto": ("kto", ""), "apo_zero_unpaired": ("apo_zero_unpaired", "")},
    "CPOTrainer": TRL_CPO,
    "ORPOTrainer": {
        "orpo": ("orpo", "The NLL covers the prompt too there, the response alone here; `beta` is `weight`."),
    },
    "TPOTrainer": TRL_TPO,
    "OnlineDPOTrainer": {
        "sigmoid": ("dpo", "Responses are sampled while training there, read from a file here."),
        "ipo": ("ipo_sum", "Sums log-ratios, unlike DPOTrainer; responses are read from a file here."),
    },
    "RewardTrainer": {
        "without a margin": ("bradley_terry", ""),
        "column `margin`": ("bradley_terry_margin", "The margin is the difference of the scores here."),
        "center_rewards_coefficient": ("bradley_terry_centred", "It is `coefficient`, 0.01 by default here."),
    },
    "SFTTrainer": {
        "nll": ("sft", "Reads the preferred response of each example here."),
        "chunked_nll": ("sft", "Logits are always made in parts here, of `head_chunk` tokens."),
        "dft": ("dft", "Reads the preferred response of each example here."),
    },
    "DistillationTrainer": {
        "generalised JSD": ("generalised_jsd", f"{JSD_ENDS}; `beta` is 1 by default there, 0.5 here."),
    },
    "GKDTrainer": {
        "generalised JSD": ("generalised_jsd", f"{JSD_ENDS}; responses are read from a file here."),
    },
}

TUNIX: dict[str, Rows] = {
    "DPOTrainer": {
        "dpo": ("dpo", ""),
        "dpo with label_smoothing": ("cdpo", "A method of its own here."),
        "orpo": (
            "orpo",
            "Takes summed log-probabilities there: the odds are lost, and an empty response gives NaN.",
        ),
    },
    "distillation": {
        "LogitStrategy": (
            "forward_kl + sft",
            "Averages over padding too there, with temperature 2; its top-k drops the tail of both distributions.",
        ),
    },
}

EASYDEL_DPO: Rows = {
    "sigmoid": ("dpo", ""),
    "sigmoid with label_smoothing": ("cdpo", "A method of its own here."),
    "hinge": ("hinge", ""),
    "ipo": ("ipo", ""),
    "exo_pair": ("exo_pair", "Fails there where `label_smoothing` is traced by jit; it is 0.001 by default here."),
    "nca_pair": ("nca_pair", ""),
    "robust": ("robust_dpo", "`label_smoothing` is 0.1 by default here."),
    "bco_pair": ("bco_pair", "The shift is the mean of the local batch there, with a gradient through it."),
    "sppo_hard": ("sppo_hard", "`beta` is 0.001 by default here."),
    "aot": ("aot", SORTED_BATCH),
    "aot_pair": ("aot_unpaired", "The old name: it matches chosen with rejected log-ratios, of one device there."),
    "apo_zero": ("apo_zero", ""),
    "apo_down": ("apo_down", ""),
    "discopop": ("discopop", "The temperature is always 1 there, 0.05 by default here."),
    "kto": ("dpo", "Not KTO there: it is `sigmoid`."),
}

EASYDEL: dict[str, Rows] = {
    "DPOTrainer": EASYDEL_DPO,
    "CPOTrainer": {
        "sigmoid": ("cpo", "The NLL is a mean over tokens in both."),
        "hinge": ("slic_hf", "Its margin is `beta` times that of `slic_hf` with `delta` = 1 / `beta`."),
        "ipo": ("losses.ipo", "No method here; take it with reference log-probabilities of 0."),
        "simpo": ("simpo", "Has a supervised term there unless `cpo_alpha` is 0."),
        "alphapo": ("alphapo", "exp(logp)^(-alpha) can underflow there."),
    },
    "ORPOTrainer": {"orpo": ("orpo", "Takes the logarithm of a sigmoid there, without a stable form.")},
    "KTOTrainer": {
        "kto": ("kto", "Under gradient accumulation its KL term compares different responses of the two models."),
        "apo_zero_unpaired": ("apo_zero_unpaired", ""),
    },
    "BCOTrainer": {"bco": ("bco", "The weights of its prompt matching are `losses.udm_weights` here.")},
    "GKDTrainer": {
        "generalised JSD": (
            "generalised_jsd",
            "M is mixed the other way round there, no JSD unless `beta` is 1/2, and its mask misses the first token.",
        ),
    },
    "DistillationTrainer": {
        "KD": ("forward_kl + sft", "Has temperature 4 and weight 0.9 by default there; temperature 1 here."),
    },
}

HALOS: dict[str, Rows] = {
    "trainers": {
        "cDPO": ("cdpo", "`label_smoothing` is 0.2 by default there, 0.1 here."),
        "IPO": ("ipo", "Counts tokens as nonzero log-ratios there: 0/0 where the policy is the reference."),
        "KTO": ("kto", ""),
        "SLiC-HF": ("slic_hf", "Adds a supervised term of one value a token to a margin of one value a pair there."),
    },
}

OPENRLHF: dict[str, Rows] = {
    "DPO trainer": {
        "dpo": ("dpo", ""),
        "dpo with label_smoothing": ("cdpo", "A method of its own here."),
        "ipo": ("ipo_sum", "Sums log-ratios, as the paper writes it; TRL's, a mean over tokens, is `ipo`."),
        "NLL coefficient": ("dpo + sft", "A mean over tokens in both; `rpo` is the sum of the paper's code."),
    },
}

PEERS: dict[str, dict[str, Rows]] = {
    "TRL": TRL,
    "tunix": TUNIX,
    "EasyDeL": EASYDEL,
    "HALOs": HALOS,
    "OpenRLHF": OPENRLHF,
}

PEER_LOSSES: tuple[PeerLoss, ...] = tuple(
    PeerLoss(peer, trainer, name, ours, difference)
    for peer, trainers in PEERS.items()
    for trainer, rows in trainers.items()
    for name, (ours, difference) in rows.items()
)

INTRODUCTION = """\
# Switching from another library

What each loss of other libraries is here, and what changes with it. A name in the column "here" is a value of
`objective.loss_type` ([methods](methods.md)); `losses.NAME` is a function that no method is made of, for those who
write their own step; `a + b` is two methods with `objective.loss_weights`. An empty difference means the same formula.
Learning rates, batches and data are other settings: [trl.md](trl.md) goes through those of TRL, with the commands from
a Hugging Face directory to another, and ten steps that agree with TRL's.

TRL's `sigmoid`, `sigmoid_norm` and `robust` may be written for `dpo`, `ln_dpo` and `robust_dpo`. Old names of losses,
such as `aot_pair`, and TRL's settings that have another name here are errors that say what to write, and
so is a setting that nothing reads. Policy gradients, and training on responses sampled meanwhile, are not here.

Libraries change. What was read:
"""


def render_markdown() -> str:
    """The text of docs/switching.md."""
    lines = [INTRODUCTION, "| library | release | read |", "|---|---|---|"]
    lines += [f"| {peer} | {version.release} | {version.read} |" for peer, version in VERSIONS.items()]
    for peer in PEERS:
        lines += ["", f"## {peer}", "", "| trainer | there | here | difference |", "|---|---|---|---|"]
        found = [loss for loss in PEER_LOSSES if loss.peer == peer]
        lines += [f"| {x.trainer} | {_code(x.name)} | {_code(x.ours)} | {x.difference} |" for x in found]
    return "\n".join(lines) + "\n"


def _code(name: str) -> str:
    described = "`" in name or name.endswith(" JSD") or name.startswith(("without ", "NLL "))  # words, not a name
    return name if described else " + ".join(f"`{part}`" for part in name.split(" + "))


if __name__ == "__main__":
    print(render_markdown(), end="")
