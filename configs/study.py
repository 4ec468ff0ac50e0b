"""The study: methods over seeds and settings in the embedded world.

python -m palign.cli.study --config=configs/study.py --workdir=runs/study
python -m palign.cli.study --config=configs/study.py:full --workdir=runs/study --minutes=60

The sizes are `small` (the default), `full` and `smoke` (seconds, to see that it runs). A grid lists an odd number of
values for each setting: first the middle of all is run, then one setting is varied at a time. `small` takes the middle.
"""

from typing import Any

from ml_collections import ConfigDict

from palign.config.load import ordered

RATES = (5e-4, 1e-3, 2e-3)
SFT_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
BETAS = (0.25, 0.5, 1.0)
BETA0 = 0.5  # of DPO and reverse DPO, which AlignDistil reads: the middle of their grid
# Titles of pictures.
LISTS = "lists and thumbs"
MEANS = "means over tokens"
LENGTHS = "lists of other lengths"
FILTERS = "filtered pairs"


def line(
    label: str,
    loss: str,
    *,
    rates: tuple = RATES,
    data: str = "pairs",
    hyper: Any = (),
    group: str = "pairs against a reference",
    **grid: tuple,
) -> dict:
    """A method of the study; `grid` holds its hyper-parameters."""
    grid = dict(learning_rate=rates, **grid)
    return dict(label=label, loss=loss, data=data, hyper=dict(hyper), group=group, grid=grid)


def ratios(*values: float) -> tuple[float, ...]:
    """The beta of a constant ratio beta0 / beta."""
    return tuple(BETA0 / value for value in values)


def distilled(label: str, loss: str, **grid: tuple) -> dict:
    """A form of AlignDistil, on the preferred responses of the pairs."""
    return line(label, loss, data="best", hyper=dict(beta0=BETA0), group="AlignDistil", **grid)


def on_policy(method: dict) -> dict:
    """The same on the policy's own responses."""
    return method | dict(label=f"{method['label']}, on-policy", group="AlignDistil, on-policy", rollout_every=1)


ALIGNDISTIL = {
    "aligndistil": distilled("AlignDistil", "aligndistil", scale=(0.5, 1.0, 2.0)),
    "aligndistil_theorem1": distilled("AD Theorem 1", "aligndistil_theorem1", beta=ratios(1, 1.25, 1.5)),
    "aligndistil_contrastive": distilled("AD contrastive", "aligndistil_contrastive", beta=ratios(0.25, 0.5, 0.7)),
    "aligndistil_ratio": distilled("AD constant ratio", "aligndistil_contrastive", beta=ratios(0.8, 1, 2)),
    "aligndistil_constant": distilled("AD equal weights", "aligndistil_constant", scale=(0.5, 1.0, 2.0)),
}
# One setting each: the middle of the grids of DPO and of LiPO-lambda, which they are compared with.
PROBE = dict(rates=(1e-3,), beta=(0.5,))
PROBES = {
    "dpo_k2": line("DPO, K = 2", "dpo", group=LENGTHS, **PROBE) | dict(responses=2),
    "lipo_lambda_k2": line("LiPO-λ, K = 2", "lipo_lambda", data="lists", group=LENGTHS, **PROBE) | dict(responses=2),
    "dpo_k8": line("DPO, K = 8", "dpo", group=LENGTHS, **PROBE) | dict(responses=8),
    "lipo_lambda_k8": line("LiPO-λ, K = 8", "lipo_lambda", data="lists", group=LENGTHS, **PROBE) | dict(responses=8),
    "dpo_ches": line("DPO, CHES filter", "dpo", data="ches", group=FILTERS, **PROBE),
    "dpo_random": line("DPO, pairs by lot", "dpo", data="random", group=FILTERS, **PROBE),
}
METHODS = {
    # The small study.
    "dpo": line("DPO", "dpo", beta=BETAS),
    "reverse": line("reverse DPO", "dpo", rates=(1e-3,), data="reversed", beta=(BETA0,)),
    "ipo": line("IPO", "ipo", beta=(0.5, 1.0, 2.0)),
    "lipo_lambda": line("LiPO-λ", "lipo_lambda", data="lists", group=LISTS, beta=BETAS),
    "aligndistil": ALIGNDISTIL["aligndistil"],
    "aligndistil_on_policy": on_policy(ALIGNDISTIL["aligndistil"]),
    # What the claims are about.
    "rpo": line("RPO", "rpo", hyper=dict(eta=0.1), beta=BETAS),
    "ln_dpo": line("LN-DPO", "ln_dpo", group=MEANS, beta=(2.5, 5.0, 10.0)),
    "aligndistil_contrastive": ALIGNDISTIL["aligndistil_contrastive"],
    **PROBES,
    # The others.
    "sft_best": line("SFT on the preferred", "sft", rates=SFT_RATES, data="best", group=MEANS),
    "cdpo": line("cDPO", "cdpo", beta=BETAS),
    "hinge": line("hinge", "hinge", beta=BETAS),
    "simpo": line("SimPO", "simpo", group=MEANS, beta=(1.0, 2.0, 4.0)),
    "kto": line("KTO", "kto", group=LISTS, beta=BETAS),
    "bco_pair": line("BCO, pairs", "bco_pair", group=LISTS, beta=BETAS),
    "bco": line("BCO, shifted prompts", "bco", data="thumbs", group=LISTS, beta=BETAS),
    "plackett_luce": line("Plackett-Luce", "plackett_luce", data="lists", group=LISTS, beta=BETAS),
    "aligndistil_theorem1": ALIGNDISTIL["aligndistil_theorem1"],
    "aligndistil_ratio": ALIGNDISTIL["aligndistil_ratio"],
    "aligndistil_constant": ALIGNDISTIL["aligndistil_constant"],
    "aligndistil_contrastive_on_policy": on_policy(ALIGNDISTIL["aligndistil_contrastive"]),
    "aligndistil_theorem1_on_policy": on_policy(ALIGNDISTIL["aligndistil_theorem1"]),
    "aligndistil_ratio_on_policy": on_policy(ALIGNDISTIL["aligndistil_ratio"]),
}
SMALL = ("dpo", "reverse", "ipo", "lipo_lambda", "aligndistil", "aligndistil_on_policy")
SMOKE = ("dpo", "reverse", "lipo_lambda", "aligndistil")


def get_config(size: str = "small") -> ConfigDict:
    """A size of the study.

    Args:
        size: `small`, `full` or `smoke`.

    Raises:
        ValueError: another one.
    """
    if size == "full":
        return _study(METHODS)
    if size == "small":
        return _study({name: _middle(METHODS[name]) for name in SMALL})
    if size == "smoke":
        methods = {name: _middle(METHODS[name]) for name in SMOKE}
        methods["dpo"] = METHODS["dpo"] | dict(grid=dict(learning_rate=(1e-3,), beta=BETAS))
        return _study(
            methods, seeds=(0, 1), sft_steps=4, prompts=24, steps=4, checkpoints=2, test_prompts=16, tuning_prompts=8
        )
    raise ValueError(f"configs/study.py:{size}: expected small, full or smoke")


def _study(methods: dict[str, dict], **more: Any) -> ConfigDict:
    first = tuple(name for name in SMALL if name in methods)
    return ConfigDict(dict(methods=ordered(**methods), first=first, **more))


def _middle(method: dict) -> dict:
    return method | dict(grid={name: (values[len(values) // 2],) for name, values in method["grid"].items()})
