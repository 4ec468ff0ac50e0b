"""DPO of a 0.5B model (Qwen2.5's shape) on one accelerator of 16 GB, or on eight.

python -m palign.cli.train --config=configs/dpo_0_5b.py --workdir=DIR --config.data.path=FILE \
    --config.init_from=SFT --config.reference_from=SFT

SFT is the workdir of a run. On eight devices `--config.data.micro_batches=1`. Plans: docs/plan.md.
"""

from ml_collections import ConfigDict

from palign.config.shapes import QWEN25_0_5B


def get_config() -> ConfigDict:
    """Sixteen rows of 2048 tokens a step, two at a time."""
    return ConfigDict(
        dict(
            model=dict(**QWEN25_0_5B),
            data=dict(max_length=1024, row_length=2048, rows_per_step=16, micro_batches=8, block=128),
            objective=dict(loss_type=("dpo",), beta=0.1, reference="cached", head_chunk=512),
            optimizer=dict(learning_rate=1e-6, schedule="linear", warmup_ratio=0.1),
            mesh=dict(data=1, fsdp=-1),
            init_from="models/qwen2.5-0.5b-sft",
            reference_from="models/qwen2.5-0.5b-sft",
        )
    )
