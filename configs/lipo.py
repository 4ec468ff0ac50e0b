"""LiPO-lambda on ranked lists of any length: tokenizer and SFT on the best responses, then the list against it.

python -m palign.cli.train --config=configs/lipo.py --config.data.path=FILE --workdir=runs/lipo

FILE has prompt, responses (2 or more, as many as there are in each record) and scores or rank; ties are fine. A record
longer than a row keeps its best, its worst and a sample of the rest, and the count is printed.
"""

from ml_collections import ConfigDict

from palign.config.load import ordered


def get_config() -> ConfigDict:
    """A small decoder, for a CPU."""
    return ConfigDict(
        dict(
            model=dict(num_layers=4, dim=128, num_heads=4, num_key_heads=2, hidden_dim=352),
            tokenizer=dict(vocab_size=2048),
            data=dict(max_length=512, row_length=2048, rows_per_step=4, oversize="subset"),
            train=dict(eval_every=20, checkpoint_every=50),
            stages=ordered(
                sft=dict(
                    data=dict(records="best_response"),
                    objective=dict(loss_type=("sft",)),
                    optimizer=dict(learning_rate=1e-3, b2=0.99, weight_decay=0.1, warmup_ratio=0.05),
                    train=dict(epochs=4, best_metric="eval_heldout_loss"),
                ),
                lipo=dict(
                    init_from="sft",
                    reference_from="sft",
                    objective=dict(loss_type=("lipo_lambda",), beta=0.05, reference="cached"),
                    optimizer=dict(learning_rate=1e-4, schedule="cosine", warmup_ratio=0.1),
                    train=dict(epochs=1),
                ),
            ),
        )
    )
