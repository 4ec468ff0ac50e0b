"""DPO of a Hugging Face model on disk: sizes, weights, tokenizer and chat template are the model's own.

python -m palign.cli.train --config=configs/dpo_from_hf.py:models/SmolLM2-135M-Instruct \
    --config.data.path=FILE --workdir=runs/dpo
python -m palign.cli.convert --from=runs/dpo --to=models/SmolLM2-135M-DPO

What stands behind the colon is the model's directory: docs/weights.md says which models are read.
"""

from ml_collections import ConfigDict


def get_config(model: str = "models/SmolLM2-135M-Instruct") -> ConfigDict:
    """Sixteen rows of 1024 tokens a step, the reference's log-probabilities computed once before training.

    Args:
        model: a directory with `config.json`, safetensors and a tokenizer.
    """
    return ConfigDict(
        dict(
            init_from=model,
            reference_from=model,
            data=dict(max_length=1024, row_length=1024, rows_per_step=16, micro_batches=4),
            objective=dict(loss_type=("dpo",), beta=0.1, reference="cached"),
            optimizer=dict(learning_rate=1e-6, schedule="linear", warmup_ratio=0.1),
            train=dict(eval_every=100),
        )
    )
