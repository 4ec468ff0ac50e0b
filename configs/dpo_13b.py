"""DPO as the EasyLM fork of "Unpacking DPO and PPO" ran it: Llama 2 13B, 32 pairs a step, sequences of 4096 tokens.

python -m palign.cli.train --config=configs/dpo_13b.py --workdir=DIR --config.data.path=FILE \
    --config.init_from=SFT --config.reference_from=SFT

Beta 0.1, rate 5e-7, linear with a tenth of warm-up, three epochs, one pair a row so that a step is exactly 32 pairs;
the reference's log-probabilities computed beforehand, which is an option there. SFT is the workdir of a run. Plans:
docs/plan.md.
"""

from ml_collections import ConfigDict

from palign.config.shapes import LLAMA2_13B


def get_config() -> ConfigDict:
    """A row holds a prompt once and both responses; two of 4096 tokens without a shared prompt still fit."""
    return ConfigDict(
        dict(
            model=dict(**LLAMA2_13B),
            data=dict(max_length=4096, row_length=8192, rows_per_step=32, packing="one_per_row", block=128),
            objective=dict(loss_type=("dpo",), beta=0.1, reference="cached", head_chunk=1024),
            optimizer=dict(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1),
            train=dict(epochs=3),
            mesh=dict(data=1, fsdp=-1),
            init_from="models/llama-2-13b-sft",
            reference_from="models/llama-2-13b-sft",
        )
    )
