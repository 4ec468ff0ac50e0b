"""AlignDistil as its authors ran it: Qwen2.5-1.5B-Instruct, UltraFeedback, DPO, reverse DPO, then distillation.

python -m palign.cli.train --config=configs/aligndistil_1_5b.py --workdir=DIR --config.data.path=FILE \
    --config.init_from=INSTRUCT --config.stages.dpo.reference_from=INSTRUCT \
    --config.stages.reverse.reference_from=INSTRUCT

INSTRUCT is the workdir of a run of that shape. Adam (0.9, 0.95), no decay, rate 1e-6, cosine to a tenth, clipping at 1,
one epoch, prompt and response of at most 2048 tokens (the authors' scripts). They take 128 pairs a step; rows are full
here, and 24 hold about as many. Plans: docs/plan.md.
"""

from ml_collections import ConfigDict

from palign.config.load import ordered
from palign.config.shapes import QWEN25_1_5B

INSTRUCT = "models/qwen2.5-1.5b-instruct"


def get_config() -> ConfigDict:
    """All stages start from the instruct model, the last one too; scale 20 is the authors' 10, which has no 1/2."""
    preference = dict(loss_type=("dpo",), beta=0.1, reference="cached", head_chunk=1024)
    return ConfigDict(
        dict(
            model=dict(**QWEN25_1_5B),
            data=dict(max_length=2048, row_length=4096, rows_per_step=24, block=128),
            optimizer=dict(learning_rate=1e-6, b2=0.95, schedule="cosine_to_floor", floor=0.1, warmup_ratio=0.1),
            mesh=dict(data=1, fsdp=-1),
            init_from=INSTRUCT,
            stages=ordered(
                dpo=dict(reference_from=INSTRUCT, objective=preference),
                reverse=dict(reference_from=INSTRUCT, objective=preference, data=dict(records="reversed")),
                aligndistil=dict(
                    teacher_from="dpo",
                    reverse_from="reverse",
                    data=dict(records="best_response", row_length=2048),
                    objective=dict(loss_type=("aligndistil",), beta0=0.1, scale=20.0, head_chunk=512),
                ),
            ),
        )
    )
