"""DPO of an 8B model (Llama 3.1's shape) on a pod slice or a few GPU nodes; the reference's log-probabilities cached.

python -m palign.cli.train --config=configs/dpo_8b.py --workdir=DIR --config.data.path=FILE \
    --config.init_from=SFT --config.reference_from=SFT

SFT is the workdir of a run. Plans: docs/plan.md.
"""

from ml_collections import ConfigDict

from palign.config.shapes import LLAMA3_8B


def get_config() -> ConfigDict:
    """One row of 2048 tokens a device on 256 devices: some 800 pairs of UltraFeedback's lengths a step."""
    return ConfigDict(
        dict(
            model=dict(**LLAMA3_8B),
            data=dict(max_length=1024, row_length=2048, rows_per_step=256, block=128),
            objective=dict(loss_type=("dpo",), beta=0.1, reference="cached", head_chunk=1024),
            optimizer=dict(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1),
            mesh=dict(data=1, fsdp=-1),
            init_from="models/llama-3.1-8b-sft",
            reference_from="models/llama-3.1-8b-sft",
        )
    )
