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
BETAS = (0.25, 0.5, 1.0)
BETA0 = 0.5  # of DPO and reverse DPO, which AlignDistil reads: the middle of their grid


def line(label: str, loss: str, *, rates: tuple = RATES, data: str = "pairs", hyper: Any = (), **grid: tuple) -> dict:
    """A method of the study; `grid` holds its hyper-parameters."""
    grid = dict(learning_rate=rates, **grid)
    return dict(label=label, loss=loss, data=data, hyper=dict(hyper), grid=grid)


def ratios(*values: float) -> tuple[float, ...]:
    """The beta of a constant ratio beta0 / beta."""
    return tuple(BETA0 / value for value in values)


def distilled(label: str, loss: str, **grid: tuple) -> dict:
    """A form of AlignDistil, on the preferred responses of the pairs."""
    return line(label, loss, data="best", hyper=dict(beta0=BETA0), **grid)


def on_policy(method: dict) -> dict:
    """The same on the policy's own responses."""
    return method | dict(label=f"{method['label']}, on-policy", rollout_every=1)


ALIGNDISTIL = {
    "aligndistil": distilled("AlignDistil", "aligndistil", scale=(0.5, 1.0, 2.0)),
    "aligndistil_theorem1": distilled("AlignDistil, Theorem 1", "aligndistil_theorem1", beta=ratios(1, 1.25, 1.5)),
    "aligndistil_contrastive": distilled(
        "AlignDistil, contrastive", "aligndistil_contrastive", beta=ratios(0.25, 0.5, 0.7)
    ),
    "aligndistil_ratio": distilled("AlignDistil, constant ratio", "aligndistil_contrastive", beta=ratios(0.8, 1, 2)),
    "aligndistil_constant": distilled("AlignDistil, equal weights", "aligndistil_constant", scale=(0.5, 1.0, 2.0)),
}
METHODS = {
    "dpo": line("DPO", "dpo", beta=BETAS),
    "reverse": line("reverse DPO", "dpo", rates=(1e-3,), data="reversed", beta=(BETA0,)),
    "ipo": line("IPO", "ipo", beta=(0.5, 1.0, 2.0)),
    "lipo_lambda": line("LiPO-λ", "lipo_lambda", data="lists", beta=BETAS),
    "aligndistil": ALIGNDISTIL["aligndistil"],
    "aligndistil_on_policy": on_policy(ALIGNDISTIL["aligndistil"]),
    "sft_best": line("SFT on the preferred", "sft", rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), data="best"),
    "cdpo": line("cDPO", "cdpo", beta=BETAS),
    "hinge": line("hinge", "hinge", beta=BETAS),
    "ln_dpo": line("LN-DPO", "ln_dpo", beta=(2.5, 5.0, 10.0)),
    "simpo": line("SimPO", "simpo", beta=(1.0, 2.0, 4.0)),
    "rpo": line("RPO", "rpo", hyper=dict(eta=0.1), beta=BETAS),
    "kto": line("KTO", "kto", beta=BETAS),
    "bco_pair": line("BCO, pairs", "bco_pair", beta=BETAS),
    "bco": line("BCO, shifted prompts", "bco", data="thumbs", beta=BETAS),
    "plackett_luce": line("Plackett-Luce", "plackett_luce", data="lists", beta=BETAS),
    **{name: given for name, given in ALIGNDISTIL.items() if name != "aligndistil"},
    **{
        f"{name}_on_policy": on_policy(ALIGNDISTIL[name])
        for name in ("aligndistil_theorem1", "aligndistil_contrastive", "aligndistil_ratio")
    },
}
# One setting each: what they are compared with is the middle of the grid above.
PROBES = {
    **{
        f"{name}_k{K}": METHODS[name] | dict(label=f"{METHODS[name]['label']}, K = {K}", responses=K)
        for K in (2, 8)
        for name in ("dpo", "lipo_lambda")
    },
    "dpo_ches": METHODS["dpo"] | dict(label="DPO, CHES filter", data="ches"),
    "dpo_random": METHODS["dpo"] | dict(label="DPO, pairs by lot", data="random"),
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
        methods = METHODS | {name: _middle(probe) for name, probe in PROBES.items()}
        return _study(methods)
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
