"""Records ten optimizer steps of TRL's own DPOTrainer on a tiny model, as `trl_trajectory.npz` and `.json` beside this.

Run by hand, in an environment of its own; neither palign nor its tests need torch:

    pip install "trl==1.16.0" "transformers==5.23.0" "torch==2.13.0" --extra-index-url https://download.pytorch.org/whl/cpu
    python tests/parity/make_trl_fixture.py

Everything is made here: random weights, a tokenizer of words, forty pairs of ragged lengths. Per run the files hold the
weights before and after, the token ids of every step's pairs as TRL tokenised and ordered them, what TRL logged at
every step (at full precision), the learning rate of each step, and transformers' own log-probabilities at step 0.
"""

import copy
import json
import pathlib
import platform
import tempfile

import accelerate
import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = pathlib.Path(__file__).parent
VOCAB, WIDTH, STEPS, PAIRS_PER_STEP, SEED = 59, 24, 10, 4, 7
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ADAMW = {"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0}
# Name -> model, does it share its embedding, loss types, weights. Llama has no biases, Qwen2 has them on q, k and v.
RUNS = {
    "sigmoid": ("llama", False, ["sigmoid"], [1.0]),
    "ipo": ("qwen2", True, ["ipo"], [1.0]),
    "sigmoid_sft": ("llama", False, ["sigmoid", "sft"], [1.0, 0.5]),
}
LOGGED = (
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=None
    )


def make_pairs() -> datasets.Dataset:
    """Prompts of 1 to 12 words, responses of 1 to 11; some texts end in EOS already, TRL adds it to the others."""
    rng = np.random.default_rng(SEED)

    def text(longest):
        return " ".join(f"w{i}" for i in rng.integers(0, VOCAB - 3, rng.integers(1, longest + 1)))

    rows = []
    for i in range(STEPS * PAIRS_PER_STEP):
        end = "<eos>" if i % 3 == 0 else ""
        rows.append({"prompt": text(12), "chosen": " " + text(11) + end, "rejected": " " + text(11)})
    return datasets.Dataset.from_list(rows)


def make_model(family: str, tied: bool):
    torch.manual_seed(SEED)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
    made = model(config(**SIZES, tie_word_embeddings=tied, attn_implementation="eager")).float()
    with torch.no_grad():  # norm scales and biases start at 1 and 0: move them, so that a mix-up shows
        for weight in made.parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
    return made


class Recorder(trl.DPOTrainer):
    """TRL's trainer, with its inputs and logs written down."""

    def __init__(self, *args, **kwargs):
        self.steps = []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        chosen, rejected = (_split(inputs, half) for half in (0, 1))
        pairs = []
        for (prompt, first), (same, second) in zip(chosen, rejected, strict=True):
            assert prompt == same
            pairs.append([prompt, first, second])
        self.steps.append({"pairs": pairs, "learning_rate": self.optimizer.param_groups[0]["lr"]})
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        super().log(logs, *args, **kwargs)
        if "grad_norm" in logs:
            self.steps[-1] |= {name: float(logs[name]) for name in LOGGED}


def _split(inputs, half):
    """(prompt ids, response ids) of the chosen (0) or the rejected (1) sequences of a padded batch."""
    parts = (inputs[name].chunk(2)[half] for name in ("input_ids", "attention_mask", "completion_mask"))
    rows = []
    for ids, attended, completion in zip(*parts, strict=True):
        ids, completion = ids[attended.bool()].tolist(), completion[attended.bool()].bool()
        start = len(ids) - int(completion.sum())
        assert completion[start:].all()
        rows.append((ids[:start], ids[start:]))
    return rows


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}


def first_logps(model, pairs) -> list[list[float]]:
    """Log-probabilities of every response token, each sequence alone and without padding."""
    logps = []
    for prompt, *responses in pairs:
        for response in responses:
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps.append([float(row[token]) for row, token in zip(log_p, response, strict=True)])
    return logps


def record(family: str, tied: bool, loss_type: list[str], loss_weights: list[float]):
    model = make_model(family, tied)
    before = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder,
            loss_type=loss_type,
            loss_weights=loss_weights,
            beta=0.1,
            learning_rate=5e-3,
            lr_scheduler_type="linear",
            warmup_steps=3,
            max_steps=STEPS,
            per_device_train_batch_size=PAIRS_PER_STEP,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            max_length=64,
            bf16=False,
            use_cpu=True,
            optim="adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=SEED,
            **ADAMW,
        )
        trainer = Recorder(
            model,
            ref_model=copy.deepcopy(before),
            args=arguments,
            train_dataset=make_pairs(),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    steps = trainer.steps
    assert len(steps) == STEPS and all(set(LOGGED) < set(step) for step in steps)
    run = {"family": family, "tied": tied, "loss_type": loss_type, "loss_weights": loss_weights, "steps": steps}
    run["first_logps"] = first_logps(before, steps[0]["pairs"])
    return run, weights_of(before), weights_of(model)


def main():
    runs, arrays = {}, {}
    for name, settings in RUNS.items():
        runs[name], before, after = record(*settings)
        # Runs of one family start from the same weights: they are stored once.
        arrays |= {f"{settings[0]}/before/{leaf}": value for leaf, value in before.items()}
        arrays |= {f"{name}/after/{leaf}": value for leaf, value in after.items()}
    modules = (trl, transformers, torch, tokenizers, datasets, accelerate, np)
    versions = {module.__name__: module.__version__ for module in modules} | {"python": platform.python_version()}
    shared = {"sizes": SIZES, "beta": 0.1, "learning_rate": 5e-3, "warmup_steps": 3, **ADAMW}
    text = json.dumps({"versions": versions, "shared": shared, "runs": runs}, separators=(",", ":"))
    (HERE / "trl_trajectory.json").write_text(text + "\n")
    np.savez_compressed(HERE / "trl_trajectory.npz", **arrays)


if __name__ == "__main__":
    main()
