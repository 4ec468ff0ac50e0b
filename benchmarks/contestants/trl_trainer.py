"""TRL's DPOTrainer as it is configured best for the case: no gradient checkpointing, SDPA, no logging, no saving.

Its own collator, `training_step`, clipping and optimizer run, in the order of its training loop. Only tokenisation is
left out: the data set begins with the columns that TRL's own preparation leaves.
"""

import argparse
import itertools
import os
import pathlib
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from benchmarks import cases
from benchmarks.worker import Done, serve

PACKAGES = ("trl", "transformers", "torch", "accelerate", "numpy")


class Tokenised(DPOTrainer):
    """Takes a data set that is tokenised already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def make_trainer(flags: argparse.Namespace, output: str) -> DPOTrainer:
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = itertools.chain.from_iterable(cases.read_rounds(flags.case))
    examples = [dict(zip(columns, (part.tolist() for part in pair), strict=True)) for pair in pairs]
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    config = DPOConfig(
        output_dir=output,
        beta=cases.BETA,
        learning_rate=cases.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=cases.MAX_GRAD_NORM,
        max_length=None,
        per_device_train_batch_size=flags.batch,
        precompute_ref_log_probs=flags.reference == "cached",
        gradient_checkpointing=flags.checkpointing,
        bf16=cases.read_dtype(flags.case) == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Tokenised(
        model=str(flags.case),
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, required=True, help="pairs of a step")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument("--checkpointing", action="store_true", help="to save memory")
    flags = parser.parse_args()
    rounds = cases.read_rounds(flags.case)
    starts = [0, *itertools.accumulate(len(pairs) for pairs in rounds)]
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(flags, output)
        model, data = trainer.model, trainer.train_dataset

        def take(index: int) -> Done:
            slots = 0
            for first in range(starts[index], starts[index + 1], flags.batch):
                members = range(first, min(first + flags.batch, starts[index + 1]))
                inputs = trainer.data_collator([data[i] for i in members])
                slots += inputs["input_ids"].numel()
                loss = trainer.training_step(model, inputs)
                norm = trainer._clip_grad_norm(model)
                trainer.optimizer.step()
                trainer.lr_scheduler.step()
                model.zero_grad()
            values = {"loss": float(loss), "grad_norm": float(norm)}
            work = cases.work(rounds[index]) | {"slots": slots}
            return Done(values, work, {"ids": cases.digest(rounds[index])})

        serve(take, packages=PACKAGES, same={"weights": cases.weights_digest(flags.case)}, **device())


def device() -> dict:
    """For `serve`: the accelerator's name and its peak."""
    if not torch.cuda.is_available():
        return {}
    return {"device": torch.cuda.get_device_name(), "device_peak": torch.cuda.max_memory_allocated}


if __name__ == "__main__":
    main()
