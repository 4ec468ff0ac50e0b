"""DPO of a 70B model (Llama 3.1's shape) on a large slice or eight GPU nodes; the reference's log-probabilities cached.

python -m palign.cli.train --config=configs/dpo_70b.py --workdir=DIR --config.data.path=FILE \
    --config.init_from=SFT --config.reference_from=SFT

SFT is the workdir of a run. Plans: docs/plan.md.
"""

from ml_collections import ConfigDict

from palign.config.shapes import LLAMA3_70B


def get_config() -> ConfigDict:
    """The same batch as configs/dpo_8b.py."""
    return ConfigDict(
        dict(
            model=dict(**LLAMA3_70B),
            data=dict(max_length=1024, row_length=2048, rows_per_step=256, block=128),
            objective=dict(loss_type=("dpo",), beta=0.1, reference="cached", head_chunk=1024),
            optimizer=dict(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1),
            mesh=dict(data=1, fsdp=-1),
            init_from="models/llama-3.1-70b-sft",
            reference_from="models/llama-3.1-70b-sft",
        )
    )
