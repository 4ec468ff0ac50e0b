"""Every setting of palign: frozen, validated dataclasses, standard library only.

A config file builds nested values with the same names (`palign.config.load`); nothing below the command line sees
anything but these classes. A message names the key as it is written on the command line.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def _require(condition: bool, key: str, given: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"config.{key} = {given!r}: expected {expected}")


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value > 0, f"{section}.{name}", value, "a number above 0")


def _not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value >= 0, f"{section}.{name}", value, "a number, 0 or above")


def _one_of(section: str, config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    _require(value in choices, f"{section}.{name}", value, "one of " + ", ".join(choices))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context; factor 1 leaves them."""

    factor: float = 1.0
    original_length: int = 0  # set: only slow frequencies are stretched (Llama 3)
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        """Checks ranges and their order."""
        _positive("model.rope_scalings", self, "factor", "low_frequency_factor", "high_frequency_factor")
        _not_negative("model.rope_scalings", self, "original_length")
        key, low, high = "high_frequency_factor", self.low_frequency_factor, self.high_frequency_factor
        _require(high > low, f"model.rope_scalings.{key}", high, f"above low_frequency_factor = {low}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: Llama, Qwen, Mistral and Gemma are values of these fields."""

    vocab_size: int = 0  # 0: the tokenizer's
    vocab_multiple: int = 64  # the embedding is padded to a multiple of this; the extra ids are never emitted
    num_layers: int = 4
    dim: int = 128
    num_heads: int = 4
    num_key_heads: int = 2
    head_dim: int = 0  # 0: dim / num_heads
    hidden_dim: int = 352
    activation: str = "silu"  # silu, gelu_tanh
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # 1 where the stored scale is w of (1 + w)
    norms_per_layer: int = 2  # 2 or 4
    rope_bases: tuple[float, ...] = (10000.0,)  # pattern over the layers
    rope_scalings: tuple[RopeScaling, ...] = (RopeScaling(),)  # pattern over the layers
    windows: tuple[int, ...] = (0,)  # pattern over the layers; 0 = unlimited
    tie_embedding: bool = True
    value_head: int = 0  # outputs of a value head: 1 for a reward model, 2k for GPM's embedding, 0 = none
    qk_norm: bool = False
    attention_bias: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    param_dtype: str = "float32"
    dtype: str = "auto"  # of the computation
    scan_layers: bool = True
    remat: str = "full"  # what the backward pass recomputes of a layer: none, attention, dots, full (docs/memory.md)

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.dim // self.num_heads

    def __post_init__(self) -> None:
        """Checks ranges and what must fit together."""
        _positive("model", self, "num_layers", "dim", "num_heads", "num_key_heads", "hidden_dim", "vocab_multiple")
        _positive("model", self, "norm_epsilon", "embedding_scale")
        _not_negative("model", self, "vocab_size", "head_dim", "norm_offset", "value_head")
        for name in ("attention_softcap", "final_softcap", "query_scale"):
            if getattr(self, name) is not None:
                _positive("model", self, name)
        _one_of("model", self, "activation", ("silu", "gelu_tanh"))
        _one_of("model", self, "dtype", ("auto", "float32", "bfloat16"))
        _one_of("model", self, "remat", ("none", "dots", "attention", "full"))
        _one_of("model", self, "param_dtype", ("float32", "bfloat16"))
        _require(self.norms_per_layer in (2, 4), "model.norms_per_layer", self.norms_per_layer, "2 or 4")
        divides = self.num_heads % self.num_key_heads == 0
        _require(divides, "model.num_key_heads", self.num_key_heads, f"a divisor of num_heads = {self.num_heads}")
        whole = self.head_dim or self.dim % self.num_heads == 0
        _require(bool(whole), "model.dim", self.dim, f"a multiple of num_heads = {self.num_heads}, or head_dim set")
        _require(self.head_width % 2 == 0, "model.head_dim", self.head_width, "an even number (rotary halves)")
        for name in ("windows", "rope_bases", "rope_scalings"):
            _require(len(getattr(self, name)) > 0, f"model.{name}", getattr(self, name), "at least one entry")
        _require(min(self.windows) >= 0, "model.windows", self.windows, "numbers of positions, 0 = unlimited")
        positive = all(math.isfinite(base) and base > 0 for base in self.rope_bases)
        _require(positive, "model.rope_bases", self.rope_bases, "numbers above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer; without a path one is trained on the training texts."""

    path: str = ""  # a .model, a tokenizer.json, or a directory that holds one
    chat_template: str = ""  # a file of Jinja that writes out conversations; "": what lies beside the tokenizer
    model_type: str = "bpe"  # of a trained one: bpe, unigram, word
    vocab_size: int = 2048  # of a trained one

    def __post_init__(self) -> None:
        """Checks ranges."""
        _positive("tokenizer", self, "vocab_size")
        _one_of("tokenizer", self, "model_type", ("bpe", "unigram", "word"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records, and how they become rows."""

    path: str = ""  # a file, directory, glob, tfds:NAME/SPLIT, hf:NAME/SPLIT or prepared data (docs/data.md)
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)  # in place of path: path -> weight
    cache: str = ""  # a local directory where tokenised files are kept for other runs; "": every start tokenises
    eval_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name of a held-out set -> its path
    eval_fraction: float = 0.05  # held out of the training data as the set "heldout"; 0 = none
    limit: int = 0  # most records read of each path; 0 = all
    score_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # attribute -> weight, of rated data
    records: str = "all"  # all, best_response (SFT on the preferred one), reversed (the worse is preferred), grouped
    bad_records: str = "error"  # error, skip (drop and count records that cannot be used)
    control_text: str = "refuse"  # refuse, escape (read as text): the name of a control token in a message
    max_length: int = 512  # most tokens of a prompt and one response
    max_prompt_length: int = 0  # most tokens of a prompt; 0 = max_length - 1
    truncation: str = "keep_start"  # of longer ones: keep_start, keep_end (prompts lose their beginning), drop
    row_length: int = 1024  # T, tokens of a row
    rows_per_step: int = 8  # R, over all micro-batches and devices
    micro_batches: int = 1  # A, gradients are summed over
    packing: str = "best_fit"  # best_fit, one_per_row (padded: a row an example)
    layout: str = "packed"  # packed (prompt once), unshared (prompt again before every response)
    oversize: str = "error"  # error, subset: what to do with an example longer than a row
    pair_policy: str = "best_worst"  # best_worst, all, adjacent, random
    trees_per_row: int = 64  # G
    block: int = 64  # of attention
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks ranges and what must divide."""
        _positive("data", self, "max_length", "row_length", "rows_per_step", "micro_batches", "trees_per_row", "block")
        _not_negative("data", self, "limit", "eval_fraction", "seed", "max_prompt_length")
        _require(self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "a fraction below 1")
        _one_of("data", self, "records", ("all", "best_response", "reversed", "grouped"))
        _one_of("data", self, "bad_records", ("error", "skip"))
        if self.path and self.mixture:
            raise ValueError(f"config.data.path = {self.path!r} has no effect beside config.data.mixture; remove one")
        for name, weight in self.mixture.items():
            _require(math.isfinite(weight) and weight > 0, f"data.mixture.{name}", weight, "a number above 0")
        for name, weight in self.score_weights.items():
            _require(math.isfinite(weight), f"data.score_weights.{name}", weight, "a finite number")
        _one_of("data", self, "control_text", ("refuse", "escape"))
        _one_of("data", self, "truncation", ("keep_start", "keep_end", "drop"))
        room = self.max_prompt_length < self.max_length
        _require(room, "data.max_prompt_length", self.max_prompt_length, f"less than max_length = {self.max_length}")
        if self.truncation == "keep_end" and not self.max_prompt_length:
            raise ValueError(
                "config.data.truncation = 'keep_end': set config.data.max_prompt_length, what a prompt keeps"
            )
        _one_of("data", self, "packing", ("best_fit", "one_per_row"))
        _one_of("data", self, "layout", ("packed", "unshared"))
        _one_of("data", self, "oversize", ("error", "subset"))
        _one_of("data", self, "pair_policy", ("best_worst", "all", "adjacent", "random"))
        divides = self.rows_per_step % self.micro_batches == 0
        _require(
            divides, "data.micro_batches", self.micro_batches, f"a divisor of rows_per_step = {self.rows_per_step}"
        )
        blocks = self.row_length % self.block == 0
        _require(blocks, "data.row_length", self.row_length, f"a multiple of block = {self.block}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A weighted list of methods over one forward pass."""

    loss_type: tuple[str, ...] = ("dpo",)  # names in palign.objectives.registry.METHODS
    loss_weights: tuple[float, ...] = (1.0,)
    reference: str = "live"  # live, cached (log-probabilities per target, before training), none
    teachers: str = "live"  # live, cached (distillation's frozen models: hidden states per target, before training)
    hyper: Mapping[str, float] = dataclasses.field(default_factory=dict)  # any other key of config.objective
    head_chunk: int = 256  # targets whose logits exist at a time
    reference_sync_every: int = 0  # steps after which the reference moves to the policy (TR-DPO); 0: it stays
    reference_mixup: float = 0.6  # how much of the policy it then takes: 1 = all
    diagnostics: tuple[str, ...] = ()  # names in palign.eval.diagnostics.DIAGNOSTICS, logged with the metrics

    def __post_init__(self) -> None:
        """Checks ranges."""
        _positive("objective", self, "head_chunk")
        _one_of("objective", self, "reference", ("live", "cached", "none"))
        _one_of("objective", self, "teachers", ("live", "cached"))
        _not_negative("objective", self, "reference_sync_every")
        _positive("objective", self, "reference_mixup")
        _require(self.reference_mixup <= 1, "objective.reference_mixup", self.reference_mixup, "at most 1 (all)")
        if not self.reference_sync_every and self.reference_mixup != 0.6:
            raise ValueError(
                f"config.objective.reference_mixup = {self.reference_mixup!r} has no effect while "
                "config.objective.reference_sync_every = 0"
            )
        for name, value in self.hyper.items():
            _require(math.isfinite(value), f"objective.{name}", value, "a finite number")
        for name in ("beta", "beta0", "scale", "epsilon", "cap"):
            if name in self.hyper:
                _require(self.hyper[name] > 0, f"objective.{name}", self.hyper[name], "a number above 0")
        for weight in self.loss_weights:
            _require(math.isfinite(weight), "objective.loss_weights", self.loss_weights, "finite numbers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which form computes attention; all give the same values up to rounding."""

    kernel: str = "auto"  # auto (measured on an accelerator when a run begins), xla, pallas_tpu, pallas_gpu

    def __post_init__(self) -> None:
        """Checks the name."""
        _one_of("attention", self, "kernel", ("auto", "xla", "pallas_tpu", "pallas_gpu"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optax optimizer and its schedule."""

    name: str = "adamw"  # adamw, adafactor, lion
    learning_rate: float = 5e-4
    schedule: str = "cosine_to_floor"  # constant, linear, cosine, cosine_to_floor
    floor: float = 0.1  # of the peak, where cosine_to_floor ends
    warmup_steps: int | None = None  # exactly one of the two
    warmup_ratio: float | None = 0.1
    weight_decay: float = 0.0  # not on norm scales and biases
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    state_dtype: str = "float32"  # of the first moment of adamw and lion: float32, bfloat16

    def __post_init__(self) -> None:
        """Checks ranges, and that exactly one way of warming up is set."""
        _one_of("optimizer", self, "name", ("adamw", "adafactor", "lion"))
        _one_of("optimizer", self, "schedule", ("constant", "linear", "cosine", "cosine_to_floor"))
        _one_of("optimizer", self, "state_dtype", ("float32", "bfloat16"))
        if self.name == "adafactor" and self.state_dtype != "float32":
            raise ValueError(
                f"config.optimizer.state_dtype = {self.state_dtype!r} has no effect on adafactor, which keeps no first "
                "moment; remove it"
            )
        _positive("optimizer", self, "learning_rate", "eps", "max_grad_norm")
        _not_negative("optimizer", self, "weight_decay", "floor", "b1", "b2")
        if (self.warmup_steps is None) == (self.warmup_ratio is None):
            raise ValueError(
                f"config.optimizer: warmup_steps = {self.warmup_steps}, warmup_ratio = {self.warmup_ratio}: set "
                "exactly one and the other to None"
            )
        _not_negative("optimizer", self, "warmup_steps" if self.warmup_ratio is None else "warmup_ratio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what is written when."""

    epochs: int = 1
    max_steps: int = 0  # 0: as many as the epochs make
    eval_every: int = 0  # steps; 0: at the end only
    checkpoint_every: int = 100
    log_every: int = 10
    keep: int = 2  # newest checkpoints kept, besides the best
    best_metric: str = ""  # of an evaluation, e.g. eval_heldout_loss; "": none is kept as the best
    best_mode: str = "min"  # min, max
    stop_after_nonfinite: int = 1  # steps in a row whose loss or gradient is not finite
    ema_decay: float = 0.0  # of an average of the policy, evaluated and saved beside it; 0 = none
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks ranges."""
        _not_negative("train", self, "ema_decay")
        _require(self.ema_decay < 1, "train.ema_decay", self.ema_decay, "below 1")
        _positive("train", self, "epochs", "checkpoint_every", "log_every", "keep", "stop_after_nonfinite")
        _not_negative("train", self, "max_steps", "eval_every", "seed")
        _one_of("train", self, "best_mode", ("min", "max"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Training on the policy's own responses to the data's prompts; 0 = on the data's responses."""

    every: int = 0  # steps between two draws: 1 = every step sees what the policy says now
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Checks ranges, and that nothing is set that has no effect."""
        _not_negative("rollout", self, "every", "top_k")
        _positive("rollout", self, "max_new_tokens", "temperature", "top_p")
        _require(self.top_p <= 1, "rollout.top_p", self.top_p, "at most 1 (all)")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not self.every and value != field.default:
                raise ValueError(
                    f"config.rollout.{field.name} = {value!r} has no effect while config.rollout.every = 0; set every"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices: the axes' sizes multiply to their number; one may be -1 = what the others leave."""

    data: int = -1  # copies of the weights
    fsdp: int = 1  # pieces of a copy, gathered layer by layer
    context: int = 1  # pieces of a row
    tensor: int = 1  # pieces of heads, feed-forward width and vocabulary
    dcn_data: int = 1  # slices that `data` spans
    dcn_fsdp: int = 1  # slices that `fsdp` spans

    def __post_init__(self) -> None:
        """Checks ranges."""
        _positive("mesh", self, "dcn_data", "dcn_fsdp")
        for name in ("data", "fsdp", "context", "tensor"):
            size = getattr(self, name)
            _require(size == -1 or size > 0, f"mesh.{name}", size, "a number above 0, or -1 (what the others leave)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on a frozen base, which is `init_from`; rank 0 = none, all weights are trained."""

    rank: int = 0
    alpha: float = 16.0  # the product of the factors counts alpha / rank times
    targets: tuple[str, ...] = ("query", "key", "value", "output", "gate", "up", "down")  # kernels that get factors

    def __post_init__(self) -> None:
        """Checks ranges, and that nothing is set that has no effect."""
        _not_negative("lora", self, "rank")
        _positive("lora", self, "alpha")
        known = ("query", "key", "value", "output", "gate", "up", "down")
        wrong = not self.targets or len(set(self.targets)) != len(self.targets) or not set(self.targets) <= set(known)
        _require(not wrong, "lora.targets", self.targets, f"some of {', '.join(known)}, each once")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not self.rank and value != field.default:
                raise ValueError(f"config.lora.{field.name} = {value!r} has no effect while config.lora.rank = 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """How models that are only read are kept: the reference, teachers, the base under LoRA factors."""

    dtype: str = ""  # bfloat16; "": as stored
    placement: str = "sharded"  # sharded (as what is trained), whole (not over fsdp), host (matrices in its memory)

    def __post_init__(self) -> None:
        """Checks the choices."""
        _one_of("frozen", self, "dtype", ("", "bfloat16"))
        _one_of("frozen", self, "placement", ("sharded", "whole", "host"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: what is trained, on what, from where. Sources are a stage's name, or the workdir of a finished run."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    attention: AttentionConfig = AttentionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    lora: LoraConfig = LoraConfig()
    frozen: FrozenConfig = FrozenConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str = ""  # where the policy starts; "": random weights
    reference_from: str = ""  # the model that implicit rewards are measured against
    teacher_from: str = ""  # distillation's teacher, AlignDistil's DPO model
    reverse_from: str = ""  # AlignDistil's reverse-DPO model

    @property
    def sources(self) -> dict[str, str]:
        """Role of a frozen model -> where it comes from, for the roles that are set."""
        roles = {"reference": self.reference_from, "teacher": self.teacher_from, "reverse": self.reverse_from}
        return {role: source for role, source in roles.items() if source}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order, each an ordinary run in `workdir/NN-name/`."""

    stages: Mapping[str, RunConfig]
