"""LiPO-lambda on lists of up to 8 responses with an 8B model (Llama 3.1's shape); the reference cached.

python -m palign.cli.train --config=configs/lipo_8b.py --workdir=DIR --config.data.path=FILE \
    --config.init_from=SFT --config.reference_from=SFT

SFT is the workdir of a run; FILE holds prompts, responses and scores. Plans: docs/plan.md.
"""

from ml_collections import ConfigDict

from palign.config.shapes import LLAMA3_8B


def get_config() -> ConfigDict:
    """The prompt of a list is computed once: rows hold a prompt and eight responses of 450 tokens."""
    return ConfigDict(
        dict(
            model=dict(**LLAMA3_8B),
            data=dict(max_length=1024, row_length=4096, rows_per_step=128, block=128, oversize="subset"),
            objective=dict(loss_type=("lipo_lambda",), beta=0.05, reference="cached", head_chunk=1024),
            optimizer=dict(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1),
            mesh=dict(data=1, fsdp=-1),
            init_from="models/llama-3.1-8b-sft",
            reference_from="models/llama-3.1-8b-sft",
        )
    )
