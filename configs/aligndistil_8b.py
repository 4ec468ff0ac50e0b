"""AlignDistil with an 8B model (Llama 3.1's shape): DPO, reverse DPO, then the distillation of the two.

python -m palign.cli.train --config=configs/aligndistil_8b.py --workdir=DIR --config.data.path=FILE \
    --config.init_from=SFT --config.stages.dpo.reference_from=SFT --config.stages.reverse.reference_from=SFT

SFT is the workdir of a run. The last stage holds three models, two of them frozen. Plans: docs/plan.md.
"""

from ml_collections import ConfigDict

from palign.config.load import ordered
from palign.config.shapes import LLAMA3_8B

SFT = "models/llama-3.1-8b-sft"


def get_config() -> ConfigDict:
    """The stages of configs/aligndistil.py, with the paper's optimizer."""
    preference = dict(loss_type=("dpo",), beta=0.1, reference="cached", head_chunk=1024)
    return ConfigDict(
        dict(
            model=dict(**LLAMA3_8B),
            data=dict(max_length=1024, row_length=2048, rows_per_step=256, block=128),
            optimizer=dict(learning_rate=1e-6, b2=0.95, schedule="cosine_to_floor", floor=0.1, warmup_ratio=0.1),
            mesh=dict(data=1, fsdp=-1),
            init_from=SFT,
            stages=ordered(
                dpo=dict(reference_from=SFT, objective=preference),
                reverse=dict(reference_from=SFT, objective=preference, data=dict(records="reversed")),
                aligndistil=dict(
                    teacher_from="dpo",
                    reverse_from="reverse",
                    data=dict(records="best_response"),
                    objective=dict(loss_type=("aligndistil",), beta0=0.1, scale=20.0, head_chunk=512),
                ),
            ),
        )
    )
