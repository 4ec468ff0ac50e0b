"""The AlignDistil recipe: SFT, DPO, reverse DPO (the same pairs swapped), then token-level distillation of the two.

python -m palign.cli.train --config=configs/aligndistil.py --config.data.path=FILE --workdir=runs/aligndistil

The last stage starts from the SFT model and learns, at every token, the distribution of
`z_dpo + alpha_t (z_dpo - z_reverse)`, alpha_t adapted to the distance of the two (arXiv 2503.02832): on the chosen
responses with the teachers' hidden states cached, with `configs/aligndistil.py:on_policy` on the policy's own, drawn
anew every step, and with `configs/aligndistil.py:official` as the authors' off-policy code computes it.
"""

from typing import Any

from ml_collections import ConfigDict

from palign.config.load import ordered

# What tells the three forms of the last stage apart; scale 20 and 30 are the authors' 10 and 15, which have no 1/2.
FORMS: dict[str, dict[str, Any]] = {
    "off_policy": dict(
        data=dict(records="best_response"),
        objective=dict(loss_type=("aligndistil",), beta0=0.1, scale=20.0, teachers="cached"),
    ),
    "on_policy": dict(
        objective=dict(loss_type=("aligndistil",), beta0=0.1, scale=30.0),
        rollout=dict(every=1, max_new_tokens=128, temperature=1.0),
    ),
    "official": dict(
        data=dict(records="best_response"),
        objective=dict(loss_type=("aligndistil_official",), beta0=0.1, scale=10.0, teachers="cached"),
    ),
}


def get_config(form: str = "off_policy") -> ConfigDict:
    """The stages' recipe of the paper at the size of a laptop: Adam (0.9, 0.95), no decay, cosine to a tenth."""
    if form not in FORMS:
        raise ValueError(f"configs/aligndistil.py:{form}: expected one of {', '.join(FORMS)}")
    preference = dict(loss_type=("dpo",), beta=0.1, reference="cached")
    return ConfigDict(
        dict(
            model=dict(num_layers=4, dim=128, num_heads=4, num_key_heads=2, hidden_dim=352),
            tokenizer=dict(vocab_size=2048),
            data=dict(max_length=512, row_length=1024, rows_per_step=8),
            optimizer=dict(learning_rate=5e-5, b2=0.95, schedule="cosine_to_floor", floor=0.1, warmup_ratio=0.1),
            train=dict(eval_every=25, checkpoint_every=50),
            stages=ordered(
                sft=dict(
                    data=dict(records="best_response"),
                    objective=dict(loss_type=("sft",)),
                    optimizer=dict(learning_rate=1e-3, weight_decay=0.1, warmup_ratio=0.05),
                    train=dict(epochs=3, best_metric="eval_heldout_loss"),
                ),
                dpo=dict(init_from="sft", reference_from="sft", objective=preference),
                reverse=dict(
                    init_from="sft", reference_from="sft", objective=preference, data=dict(records="reversed")
                ),
                aligndistil=dict(init_from="sft", teacher_from="dpo", reverse_from="reverse", **FORMS[form]),
            ),
        )
    )
