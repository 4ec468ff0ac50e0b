"""LiPO-lambda with the paper's settings: lists of 8 responses, beta 0.05, Adafactor at 2e-5, 32 lists a step.

python -m palign.cli.train --config=configs/lipo_0_5b.py --workdir=DIR --config.data.path=FILE \
    --config.init_from=SFT --config.reference_from=SFT

The paper's policy is T5-large, 770 M parameters, which is no decoder; this is Qwen2.5-0.5B's shape. SFT is the workdir
of a run. Rows are full, and 8 of them hold about 32 lists of summaries. Plans: docs/plan.md.
"""

from ml_collections import ConfigDict

from palign.config.shapes import QWEN25_0_5B


def get_config() -> ConfigDict:
    """A list's prompt is computed once for all its responses."""
    return ConfigDict(
        dict(
            model=dict(**QWEN25_0_5B),
            data=dict(max_length=1024, row_length=4096, rows_per_step=8, block=128, oversize="subset"),
            objective=dict(loss_type=("lipo_lambda",), beta=0.05, reference="cached", head_chunk=1024),
            optimizer=dict(name="adafactor", learning_rate=2e-5, schedule="constant", warmup_ratio=0.0),
            mesh=dict(data=1, fsdp=-1),
            init_from="models/qwen2.5-0.5b-sft",
            reference_from="models/qwen2.5-0.5b-sft",
        )
    )
