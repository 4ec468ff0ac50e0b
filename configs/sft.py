"""Supervised fine-tuning on the preferred responses, from random weights or from a run.

python -m palign.cli.train --config=configs/sft.py --config.data.path=FILE --workdir=runs/sft

Takes any preference file (the best response of each record is learned), prompt-completion pairs, or plain text.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A small decoder and a tokenizer trained on the data: minutes on a CPU."""
    return ConfigDict(
        dict(
            model=dict(num_layers=4, dim=128, num_heads=4, num_key_heads=2, hidden_dim=352),
            tokenizer=dict(vocab_size=2048),
            data=dict(records="best_response", max_length=512, row_length=1024, rows_per_step=8),
            objective=dict(loss_type=("sft",)),
            optimizer=dict(
                learning_rate=1e-3, b2=0.99, weight_decay=0.1, schedule="cosine_to_floor", warmup_ratio=0.05
            ),
            train=dict(epochs=3, eval_every=50, checkpoint_every=50, best_metric="eval_heldout_loss"),
        )
    )
