"""Records what TRL's own losses give on a few ragged responses, as `trl_losses.npz` and `trl_losses.json` beside this.

Run by hand, in an environment of its own; neither palign nor its tests need torch:

    pip install "trl==1.16.0" "transformers==5.23.0" "torch==2.13.0" --extra-index-url https://download.pytorch.org/whl/cpu
    python -m tests.parity.make_trl_losses

No formula is typed here. Every number comes out of the trainer that TRL's configuration built: its collator makes the
batch, its loss method is called on a random Llama of one layer, and autograd gives the gradient with respect to the
token log-probabilities (or rewards, or logits) inside. The names of all losses are read from TRL's source.
"""

import ast
import contextlib
import copy
import datetime
import itertools
import json
import pathlib
import platform
import tempfile

import accelerate
import datasets
import numpy as np
import torch
import transformers
import trl
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import iw_opd_trainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.sdft import loss_utils as sdft
from trl.experimental.sdpo import loss_utils as sdpo
from trl.experimental.server_distillation import server_distillation_trainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl.trainer import distillation_trainer

from tests.parity.make_trl_fixture import make_tokenizer

HERE = pathlib.Path(__file__).parent
VOCAB, WIDTH, SEED = 19, 16, 3
PROMPTS = (3, 1, 4, 2, 2)
# Chosen, rejected and gold responses of each prompt: each of the first two is the longer one somewhere.
RESPONSES = ((2, 3, 4), (5, 1, 2), (3, 3, 1), (1, 4, 5), (4, 2, 3))
CHOICES = ("greedy", "any", "sample", "sample", "any")
MARGINS = (0.0, 0.5, 3.0, 1.0, -0.25)
PAIR, UNPAIRED = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label")
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    initializer_range=0.25,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
    num_labels=1,
)


def grid(*names: str, **options) -> tuple[dict, ...]:
    """Settings of every loss of these names with every combination of these options."""
    combinations = list(itertools.product(*options.values()))
    return tuple({"loss_type": name} | dict(zip(options, c, strict=True)) for name in names for c in combinations)


COEFFICIENTS = (0.0, 0.2, 0.5, 0.8, 1.0)
# What stands in the trainers' configurations, case by case, under TRL's names.
DPO = (
    *grid("sigmoid", beta=(0.1, 0.5, 2.0)),
    *grid("sigmoid", beta=(0.5,), label_smoothing=(0.2,)),
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.5},
    {"loss_type": "sft"},
    *grid("hinge", "nca_pair", "bco_pair", "apo_zero", "apo_down", beta=(0.1, 1.0)),
    *grid("ipo", "sigmoid_norm", beta=(0.1, 0.7, 5.0)),
    *grid("exo_pair", beta=(0.1, 0.7), label_smoothing=(1e-3, 0.2)),
    *grid("robust", "aot", "aot_unpaired", beta=(0.1, 0.5), label_smoothing=(0.0, 0.3)),
    *grid("sppo_hard", beta=(1e-3, 0.1)),
    *grid("discopop", beta=(0.05, 0.5), discopop_tau=(0.05, 0.4)),
    *grid("sigmoid", beta=(0.01, 0.1), f_divergence_type=("reverse_kl", "forward_kl", "js_divergence")),
    *grid("sigmoid", beta=(0.1,), f_divergence_type=("alpha_divergence",), f_alpha_divergence_coef=COEFFICIENTS),
    *grid("sigmoid", beta=(0.3,), ld_alpha=(0.0, 0.4, 1.0)),
    *grid("sigmoid", "ipo", "hinge", "sft", beta=(0.5,), use_weighting=(True,)),
)
KTO = (
    *grid("kto", "apo_zero_unpaired", beta=(0.1, 0.7)),
    *grid("kto", beta=(0.3,), desirable_weight=(1.25,), undesirable_weight=(0.5,)),
)
CPO = (
    *grid("sigmoid", beta=(0.1, 0.5), cpo_alpha=(0.0, 0.3, 1.0)),
    *grid("hinge", "ipo", beta=(0.1, 0.5), cpo_alpha=(0.0,)),
    *grid("simpo", beta=(2.0, 10.0), simpo_gamma=(0.5, 3.0), cpo_alpha=(0.0,)),
    *grid("simpo", "alphapo", beta=(2.0,), simpo_gamma=(0.5,)),
    *grid("alphapo", beta=(2.0,), simpo_gamma=(0.5,), alpha=(0.25, -0.5)),
    *grid("sigmoid", "simpo", beta=(0.5,), simpo_gamma=(0.5,), cpo_alpha=(0.0,), label_smoothing=(0.2,)),
)
ORPO = grid("orpo", beta=(0.1, 1.0))
TPO = grid("sigmoid", "hinge", "ipo", "tpo-l", beta=(0.5,), tpo_alpha=(0.0, 0.7))
ONLINE_DPO = grid("sigmoid", "ipo", beta=(0.1, 0.5))
REWARD = ({}, {"margin": True}, {"center_rewards_coefficient": 0.01}, {"center_rewards_coefficient": 0.5})
SFT = grid("nll", "chunked_nll", "dft")
JSD_BETAS = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)


class Watched:
    """A model that remembers its outputs and keeps the gradients of what the losses read from them."""

    def __init__(self, model):
        self.model, self.outputs = model, []

    def __call__(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        for name in ("log_probs", "logits"):
            value = getattr(output, name, None)
            if value is not None and value.requires_grad:
                value.retain_grad()
        self.outputs.append(output)
        return output

    def __getattr__(self, name):
        return getattr(self.model, name)


class Record:
    """The arrays and the settings of all cases: a case's arrays are named `trainer/number/array`."""

    def __init__(self):
        self.cases, self.arrays = [], {}

    def add(self, trainer: str, settings: dict, fails: str | None = None, **arrays):
        number = sum(case["trainer"] == trainer for case in self.cases)
        self.cases.append({"trainer": trainer, "number": number, "settings": settings, "fails": fails})
        self.arrays |= {f"{trainer}/{number}/{name}": numpy(value) for name, value in arrays.items()}

    def inputs(self, group: str, **arrays):
        """Store what a group of cases has in common; a second call must bring the same."""
        for name, value in arrays.items():
            value = numpy(value)
            np.testing.assert_array_equal(self.arrays.setdefault(f"{group}/{name}", value), value)


def numpy(value) -> np.ndarray:
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)


def make_models():
    """Return the policy, the reference (a perturbed policy, so that log-ratios are a few nats), and a reward model."""
    torch.manual_seed(SEED)
    policy = LlamaForCausalLM(CONFIG).float()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for model in (policy, reference):
            model.lm_head.weight += 0.5 * torch.randn_like(model.lm_head.weight)
    return policy, reference, LlamaForSequenceClassification(CONFIG).float()


def make_examples(policy) -> list[dict[str, list[int]]]:
    """Token ids of prompts and responses: any, the policy's samples, or its likeliest, so that WPO's weights spread."""
    torch.manual_seed(SEED)
    choices = {"any": torch.ones_like, "sample": lambda p: p, "greedy": lambda p: p == p.max()}

    def draw(ids, length, choice):
        for _ in range(length):
            likely = policy(torch.tensor([ids])).logits[0, -1].softmax(-1)
            likely[:3] = 0.0  # no padding, end or unknown token
            ids = [*ids, int(torch.multinomial(choices[choice](likely).float(), 1))]
        return ids[-length:]

    examples, names = [], ("chosen_ids", "rejected_ids", "reference_ids")
    for prompt_length, lengths, choice in zip(PROMPTS, RESPONSES, CHOICES, strict=True):
        prompt = torch.randint(3, VOCAB, (prompt_length,)).tolist()
        with torch.no_grad():
            responses = {name: draw(prompt, length, choice) for name, length in zip(names, lengths, strict=True)}
        examples.append({"prompt_ids": prompt} | responses)
    return examples


@contextlib.contextmanager
def built(trainer, config, columns: tuple[str, ...], model, settings: dict, **kwargs):
    """TRL's trainer, made by its own configuration, over a model of its own and rows that are never read."""
    words = {"label": [True, False], "margin": [0.0, 0.0]}
    rows = datasets.Dataset.from_dict({name: words.get(name, ["w1 w2", "w3"]) for name in columns})
    with tempfile.TemporaryDirectory() as folder:
        shared = {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
        if "reference" in kwargs:
            kwargs["ref_model"] = copy.deepcopy(kwargs.pop("reference"))
        yield trainer(
            copy.deepcopy(model),
            args=config(**shared, gradient_checkpointing=False, **settings),
            train_dataset=rows,
            processing_class=make_tokenizer(),
            **kwargs,
        )


def record_dpo(record: Record, policy, reference, examples):
    """Tokens and masks are `[2B, T]`, chosen responses first, as TRL's collator lays them out."""
    for settings in DPO:
        with built(trl.DPOTrainer, trl.DPOConfig, PAIR, policy, settings, reference=reference) as trainer:
            watched, batch = Watched(trainer.model), trainer.data_collator(examples)
            trainer.ref_model = Watched(trainer.ref_model)
            try:
                loss = trainer._compute_loss(watched, batch, False)
                loss.backward()
            except RuntimeError as error:  # TRL multiplies by WPO's weight in place, which autograd may refuse
                record.add("dpo", settings, fails=str(error))
                continue
        (output,), (ref_output,) = watched.outputs, trainer.ref_model.outputs
        record.inputs("pairs", policy_logps=output.log_probs, ref_logps=ref_output.log_probs)
        if trainer.use_weighting:
            record.inputs("pairs", log_sum_sq_probs=output.log_sum_sq_probs)
        record.add("dpo", settings, loss=loss, gradient=output.log_probs.grad)
    masks = {name: batch[name].bool() for name in ("attention_mask", "completion_mask")}
    record.inputs("pairs", input_ids=batch["input_ids"], **masks)
    with torch.no_grad():
        logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    record.inputs("pairs", policy_logits=logits)


def kto_examples(examples):
    """Each pair's responses as ten records, every response scored once more after the next record's prompt."""
    rows = [
        {"prompt_ids": example["prompt_ids"], "completion_ids": example[name], "label": name == "chosen_ids"}
        for name in ("chosen_ids", "rejected_ids")
        for example in examples
    ]
    return [row | {"KL_completion_ids": rows[i - 1]["completion_ids"]} for i, row in enumerate(rows)]


def record_kto(record: Record, policy, reference, examples):
    rows = kto_examples(examples)
    # Swapping policy and reference turns the sign of the KL estimate; a batch without rejected responses is the edge.
    both = (policy, reference)
    runs = (("", *both, rows), ("swapped_", *both[::-1], rows), ("chosen_", *both, rows[: len(examples)]))
    for (prefix, model, ref_model, batch_rows), settings in itertools.product(runs, KTO):
        with built(trl.KTOTrainer, trl.KTOConfig, UNPAIRED, model, settings, reference=ref_model) as trainer:
            watched, batch = Watched(trainer.model), trainer.data_collator(batch_rows)
            trainer.ref_model = Watched(trainer.ref_model)
            loss = trainer._compute_loss(watched, batch, False)
            loss.backward()
        group, output, ref_outputs = f"{prefix}kto_inputs", watched.outputs[-1], trainer.ref_model.outputs
        record.inputs(group, policy_logps=output.log_probs, ref_logps=ref_outputs[-1].log_probs, label=batch["label"])
        if settings["loss_type"] == "kto":
            mismatched = {"policy_kl_logps": watched.outputs[0].log_probs, "ref_kl_logps": ref_outputs[0].log_probs}
            record.inputs(group, **mismatched)
        kl = trainer._metrics["train"]["kl"][0]
        record.add(f"{prefix}kto", settings, loss=loss, gradient=output.log_probs.grad, kl=kl)


def paired_batch(examples) -> dict[str, torch.Tensor]:
    """The batch that the CPO and the ORPO trainer's collator makes of tokenised rows."""
    batch = {}
    for name, side in itertools.product(("input_ids", "attention_mask", "labels"), ("chosen", "rejected")):
        rows = []
        for example in examples:
            prompt, response = example["prompt_ids"], example[f"{side}_ids"]
            row = {"input_ids": prompt + response, "attention_mask": [1] * len(prompt + response)}
            rows.append(torch.tensor((row | {"labels": [-100] * len(prompt) + response})[name]))
        padding = -100 if name == "labels" else 0
        batch[f"{side}_{name}"] = pad_sequence(rows, batch_first=True, padding_value=padding)
    return batch


def record_cpo_and_orpo(record: Record, policy, examples):
    """Per pair and with its gradient from the trainer's loss method; in all, NLL included, from its batch method."""
    batch = paired_batch(examples)
    runs = [("cpo", CPOTrainer, CPOConfig, settings) for settings in CPO]
    runs += [("orpo", ORPOTrainer, ORPOConfig, settings) for settings in ORPO]
    for name, trainer_class, config, settings in runs:
        given = {key: value for key, value in settings.items() if (name, key) != ("orpo", "loss_type")}
        with built(trainer_class, config, PAIR, policy, given) as trainer:
            watched = Watched(trainer.model)
            loss, metrics = trainer.get_batch_loss_metrics(watched, batch)
            chosen, rejected = (x.detach() for x in trainer.concatenated_forward(trainer.model, batch)[:2])
            leaves = torch.stack([chosen, rejected], dim=1).requires_grad_()
            of_pairs = trainer.cpo_loss if name == "cpo" else trainer.odds_ratio_loss
            pairs = of_pairs(leaves[:, 0], leaves[:, 1])[0]
            pairs.sum().backward()
        nll = metrics["nll_loss"]
        record.add(name, settings, loss=loss, pairs=pairs, logps=leaves, gradient=leaves.grad, nll=nll)


def record_tpo(record: Record, policy, examples):
    for settings in TPO:
        with built(TPOTrainer, TPOConfig, (*PAIR, "reference"), policy, settings) as trainer:
            watched, batch = Watched(trainer.model), trainer.data_collator(examples)
            loss = trainer._compute_loss(watched, batch, False)
            loss.backward()
        logits = watched.outputs[0].logits
        group = "tpo_inputs" if settings["tpo_alpha"] else "tpo_pair_inputs"
        mask = batch["completion_mask"].bool()
        record.inputs(group, input_ids=batch["input_ids"], completion_mask=mask, logits=logits)
        record.add("tpo", settings, loss=loss, gradient=logits.grad)


class GivenCompletions(OnlineDPOTrainer):
    """Online DPO whose completions are given, not sampled; the first of a prompt is the one that is preferred."""

    def _generate(self, model, prompts, images=None):
        return *self.given, None


def record_online_dpo(record: Record, policy, reference, examples):
    """One training step; prompts are padded on the left, completions on the right, as TRL's generation does."""
    prompts = [torch.tensor(example["prompt_ids"]) for example in examples] * 2
    completions = [torch.tensor(example[side]) for side in ("chosen_ids", "rejected_ids") for example in examples]
    given = [
        pad_sequence(values, batch_first=True, padding_side=side)
        for rows, side in ((prompts, "left"), (completions, "right"))
        for values in (rows, [torch.ones_like(row) for row in rows])
    ]
    kwargs = {"reference": reference, "reward_funcs": lambda prompts, **_: [-float(i) for i in range(len(prompts))]}
    for settings in ONLINE_DPO:
        with built(GivenCompletions, OnlineDPOConfig, ("prompt",), policy, settings, **kwargs) as trainer:
            trainer.given = given
            trainer.create_optimizer()
            loss = trainer.training_step(trainer.model, {"prompt": ["w1"] * len(examples)})
        record.add("online_dpo", settings, loss=loss)


def record_reward(record: Record, scorer, examples):
    for settings in REWARD:
        with_margin = settings.get("margin", False)
        given = {name: value for name, value in settings.items() if name != "margin"}
        with built(trl.RewardTrainer, trl.RewardConfig, PAIR[1:], scorer, given) as trainer:
            rows = [
                {name: example["prompt_ids"] + example[name] for name in ("chosen_ids", "rejected_ids")}
                | ({"margin": margin} if with_margin else {})
                for example, margin in zip(examples, MARGINS, strict=True)
            ]
            watched = Watched(trainer.model)
            loss = trainer.compute_loss(watched, dict(trainer.data_collator(rows)))
            loss.backward()
        rewards = watched.outputs[0].logits
        record.inputs("reward_inputs", rewards=rewards, margins=torch.tensor(MARGINS))
        record.add("reward", settings, loss=loss, gradient=rewards.grad)


def record_sft(record: Record, policy, examples):
    rows = [
        {"input_ids": e["prompt_ids"] + e["chosen_ids"], "labels": [-100] * len(e["prompt_ids"]) + e["chosen_ids"]}
        for e in examples
    ]
    for settings in SFT:
        with built(trl.SFTTrainer, trl.SFTConfig, ("text",), policy, settings) as trainer:
            watched = Watched(trainer.model)
            loss = trainer.compute_loss(watched, dict(trainer.data_collator(rows)))
            loss.backward()
        output = watched.outputs[0]
        record.inputs("sft_inputs", logps=output.log_probs, mask=output.label_mask)
        record.add("sft", settings, loss=loss, gradient=output.log_probs.grad)


def record_distillation(record: Record):
    """Per-position divergences of every function that TRL distils with; the stable trainer's with its gradient."""
    torch.manual_seed(SEED)
    student, teacher = 2.0 * torch.randn(2, 6, VOCAB)
    record.inputs("distillation_inputs", student=student, teacher=teacher)
    logps = student.log_softmax(-1), teacher.log_softmax(-1)
    dense = {
        "gkd": lambda beta: GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1),
        "gold": lambda beta: GOLDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1),
        "sdpo": lambda beta: sdpo.compute_divergence(*logps, beta),
        "sdft": lambda beta: sdft.compute_divergence(*logps, beta),
        "iw_opd": lambda beta: iw_opd_trainer._jsd_divergence(*logps, beta).sum(-1),
        "server_distillation": lambda beta: server_distillation_trainer._jsd_divergence(*logps, beta).sum(-1),
    }
    # With the identity as both language-model heads, hidden states are logits; no token is masked, so a mean is told.
    head, mask = torch.eye(VOCAB), torch.ones(6)
    for beta, temperature in (*((beta, 1.0) for beta in JSD_BETAS), (0.3, 2.0)):
        leaf = student.clone().requires_grad_()
        loss = distillation_trainer._chunked_divergence_loss(
            leaf, teacher, head, head, mask, beta, temperature=temperature
        )[0]
        loss.backward()
        others = {name: divergence(beta) for name, divergence in dense.items()} if temperature == 1.0 else {}
        settings = {"beta": beta, "temperature": temperature, "functions": sorted(others)}
        record.add("distillation", settings, loss=loss, gradient=leaf.grad, **others)


def names_in_source() -> dict[str, list[str]]:
    """Every string that TRL compares a `loss_type` or an `f_divergence_type` with, and every trainer: file -> names."""
    root, found = pathlib.Path(trl.__file__).parent, {}
    for file in sorted(root.rglob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            if any(ast.unparse(side).endswith(("loss_type", "loss_types", "f_divergence_type")) for side in sides):
                constants = (inner for side in sides for inner in ast.walk(side) if isinstance(inner, ast.Constant))
                names |= {constant.value for constant in constants if isinstance(constant.value, str)}
        if names or file.stem.endswith("_trainer"):
            found[file.relative_to(root).as_posix()] = sorted(names)
    return found


def main():
    policy, reference, scorer = make_models()
    examples, record = make_examples(policy), Record()
    record_dpo(record, policy, reference, examples)
    record_kto(record, policy, reference, examples)
    record_cpo_and_orpo(record, policy, examples)
    record_tpo(record, policy, examples)
    record_online_dpo(record, policy, reference, examples)
    record_reward(record, scorer, examples)
    record_sft(record, policy, examples)
    record_distillation(record)
    modules = (trl, transformers, torch, datasets, accelerate, np)
    versions = {module.__name__: module.__version__ for module in modules} | {"python": platform.python_version()}
    about = {"versions": versions, "date": datetime.date.today().isoformat(), "names": names_in_source()}
    text = json.dumps(about | {"cases": record.cases}, indent=None, separators=(",", ":"))
    (HERE / "trl_losses.json").write_text(text + "\n")
    np.savez_compressed(HERE / "trl_losses.npz", **record.arrays)


if __name__ == "__main__":
    main()
