"""Any method by its name: SFT first, the teachers that the method reads, then the method.

python -m palign.cli.train --config=configs/method.py:kto --config.data.path=FILE --workdir=runs/kto

The names are those of docs/methods.md. FILE is .jsonl or .jsonl.gz with pairs, lists or, for kto, apo_zero_unpaired and
bco, records with a `label`.
"""

from typing import Any

from ml_collections import ConfigDict

from palign.config.load import ordered

REWARD_MODEL = dict(model=dict(value_head=1), reads=())
FREE = dict(reads=())  # no reference
TEACHER = dict(reads=("teacher",))
TEACHERS = dict(reads=("teacher", "reverse"))

# Name -> what it needs besides its defaults: frozen models, hyper-parameters, settings of other sections.
METHODS: dict[str, dict[str, Any]] = {
    "sft": FREE,
    "dft": FREE,
    "dpo": {},
    "cdpo": {},
    "robust_dpo": {},
    "ipo": {},
    "ipo_sum": dict(objective=dict(beta=0.01)),
    "hinge": {},
    "ln_dpo": {},
    "r_dpo": {},
    "ld_dpo": {},
    "scaled_dpo": {},
    "margin_dpo": {},
    "mm_dpo": {},
    "margin_mse": {},
    "rpo": {},
    "dpop": {},
    "cal_dpo": {},
    "f_dpo_forward_kl": {},
    "f_dpo_js": {},
    "f_dpo_alpha": {},
    "tdpo1": dict(live=True),
    "tdpo2": dict(live=True),
    "exo_pair": {},
    "nca_pair": {},
    "apo_zero": {},
    "apo_down": {},
    "sppo_hard": {},
    "discopop": {},
    "wpo": {},
    "aot": {},
    "aot_unpaired": {},
    "spa": {},
    "bco_pair": {},
    "simpo": FREE,
    "alphapo": FREE,
    "orpo": FREE,
    "cpo": FREE,
    "slic_hf": FREE,
    "kto": {},
    "apo_zero_unpaired": {},
    "bco": {},
    "plackett_luce": {},
    "lipo_lambda": {},
    "lipo_pair_logistic": {},
    "lipo_pair_hinge": {},
    "lipo_pointwise_mse": {},
    "lipo_pointwise_sigmoid": {},
    "lipo_softmax": {},
    "listnet": {},
    "info_nca": {},
    "nca": {},
    "exo": {},
    "sppo": {},
    "gpo": {},
    "pairwise_mse": {},
    "bradley_terry": REWARD_MODEL,
    "bradley_terry_margin": REWARD_MODEL,
    "bradley_terry_scaled": REWARD_MODEL,
    "bradley_terry_centred": REWARD_MODEL,
    "masked_regression": REWARD_MODEL,
    "gpm": dict(model=dict(value_head=4), reads=()),
    "forward_kl": TEACHER,
    "reverse_kl": TEACHER,
    "generalised_jsd": TEACHER,
    "scaled_jsd": TEACHER,
    "pld": TEACHER,
    "binary_kl_norm": TEACHER,
    "aligndistil": TEACHERS,
    "aligndistil_constant": TEACHERS,
    "aligndistil_capped": TEACHERS,
    "aligndistil_official": TEACHERS,
    "aligndistil_contrastive": dict(reads=("teacher", "reverse"), objective=dict(beta=0.1)),
    "aligndistil_theorem1": dict(reads=("teacher", "reference"), objective=dict(beta=0.1), live=True),
}


def get_config(method: str = "dpo") -> ConfigDict:
    """A small decoder, for a CPU.

    Args:
        method: a name of the table.

    Raises:
        ValueError: it is not there.
    """
    if method not in METHODS:
        raise ValueError(f"configs/method.py:{method}: not a method; there are {', '.join(METHODS)}")
    needs = METHODS[method]
    reads = needs.get("reads", ("reference",))
    sft = dict(
        data=dict(records="best_response"),
        objective=dict(loss_type=("sft",)),
        optimizer=dict(learning_rate=1e-3, b2=0.99, weight_decay=0.1, warmup_ratio=0.05),
        train=dict(epochs=3),
    )
    dpo = dict(
        init_from="sft",
        reference_from="sft",
        objective=dict(loss_type=("dpo",), reference="cached"),
        optimizer=dict(learning_rate=5e-5, schedule="linear"),
    )
    last = dict(
        init_from="sft",
        objective=dict(loss_type=(method,), reference=_reference(needs, reads), **needs.get("objective", {})),
        optimizer=dict(learning_rate=5e-5, schedule="linear"),
        model=needs.get("model", {}),
        **{f"{role}_from": {"reference": "sft", "teacher": "dpo", "reverse": "reverse_dpo"}[role] for role in reads},
    )
    stages = dict(sft=sft)
    stages |= dict(dpo=dpo) if "teacher" in reads else {}
    stages |= dict(reverse_dpo=dpo | dict(data=dict(records="reversed"))) if "reverse" in reads else {}
    stages["method"] = last
    return ConfigDict(
        dict(
            model=dict(num_layers=4, dim=128, num_heads=4, num_key_heads=2, hidden_dim=352),
            tokenizer=dict(vocab_size=2048),
            data=dict(max_length=512, row_length=1024, rows_per_step=8, oversize="subset"),
            stages=ordered(**stages),
        )
    )


def _reference(needs: dict[str, Any], reads: tuple[str, ...]) -> str:
    if "reference" not in reads:
        return "none"
    return "live" if needs.get("live") else "cached"
