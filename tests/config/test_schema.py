"""What a setting may be, and what a wrong one is answered with."""

import dataclasses
import math

import pytest

from palign.config.schema import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RopeScaling,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_layers=0), r"config.model.num_layers = 0: expected a number above 0"),
        (dict(norm_epsilon=math.nan), r"config.model.norm_epsilon = nan: expected a number above 0"),
        (dict(embedding_scale=math.inf), r"config.model.embedding_scale = inf: expected"),
        (dict(vocab_size=-1), r"config.model.vocab_size = -1: expected a number, 0 or above"),
        (dict(final_softcap=0.0), r"config.model.final_softcap = 0.0: expected a number above 0"),
        (dict(query_scale=-1.0), r"config.model.query_scale = -1.0"),
        (dict(activation="relu"), r"config.model.activation = 'relu': expected one of silu, gelu_tanh"),
        (dict(dtype="float16"), r"config.model.dtype = 'float16': expected one of auto, float32, bfloat16"),
        (dict(param_dtype="auto"), r"config.model.param_dtype = 'auto'"),
        (dict(norms_per_layer=3), r"config.model.norms_per_layer = 3: expected 2 or 4"),
        (dict(num_heads=4, num_key_heads=3), r"config.model.num_key_heads = 3: expected a divisor of num_heads = 4"),
        (dict(dim=130), r"config.model.dim = 130: expected a multiple of num_heads = 4, or head_dim set"),
        (dict(head_dim=7), r"config.model.head_dim = 7: expected an even number"),
        (dict(windows=()), r"config.model.windows = \(\): expected at least one entry"),
        (dict(windows=(8, -4)), r"config.model.windows = \(8, -4\): expected numbers of positions, 0 = unlimited"),
        (dict(rope_bases=(1e4, 0.0)), r"config.model.rope_bases = \(10000.0, 0.0\): expected numbers above 0"),
        (dict(rope_bases=(math.nan,)), r"config.model.rope_bases"),
    ],
)
def test_a_model_that_cannot_be_is_an_error_that_names_the_key(given, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**given)


def test_a_head_width_of_its_own_frees_the_model_width():
    assert ModelConfig(dim=130, head_dim=32).head_width == 32
    assert ModelConfig(dim=128, num_heads=4).head_width == 32


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (DataConfig, dict(rows_per_step=8, micro_batches=3), r"config.data.micro_batches = 3: expected a divisor of"),
        (DataConfig, dict(row_length=100, block=64), r"config.data.row_length = 100: expected a multiple of block"),
        (DataConfig, dict(packing="bestfit"), r"config.data.packing = 'bestfit': expected one of best_fit,"),
        (DataConfig, dict(layout="x"), r"config.data.layout"),
        (DataConfig, dict(truncation="keep"), r"config.data.truncation = 'keep': expected one of keep_start,"),
        (DataConfig, dict(truncation="keep_end"), r"truncation = 'keep_end': set config.data.max_prompt_length"),
        (DataConfig, dict(max_prompt_length=512), r"config.data.max_prompt_length = 512: expected less than"),
        (DataConfig, dict(control_text="keep"), r"config.data.control_text = 'keep': expected one of refuse, escape"),
        (DataConfig, dict(bad_records="drop"), r"config.data.bad_records = 'drop': expected one of error, skip"),
        (DataConfig, dict(oversize="drop"), r"config.data.oversize"),
        (DataConfig, dict(pair_policy="best"), r"config.data.pair_policy"),
        (DataConfig, dict(bad_records="drop"), r"config.data.bad_records = 'drop': expected one of error, skip"),
        (DataConfig, dict(records="lists"), r"config.data.records = 'lists': expected one of all, best_response"),
        (DataConfig, dict(mixture={"a.jsonl": 0.0}), r"config.data.mixture.a.jsonl = 0.0: expected a number above 0"),
        (DataConfig, dict(path="a", mixture={"b": 1.0}), r"config.data.path = 'a' has no effect beside config.data"),
        (DataConfig, dict(score_weights={"x": math.nan}), r"config.data.score_weights.x = nan: expected a finite"),
        (DataConfig, dict(eval_fraction=1.0), r"config.data.eval_fraction = 1.0: expected a fraction below 1"),
        (DataConfig, dict(max_length=0), r"config.data.max_length"),
        (MeshConfig, dict(tensor=0), r"config.mesh.tensor = 0: expected a number above 0, or -1 \(what"),
        (MeshConfig, dict(dcn_data=-1), r"config.mesh.dcn_data = -1: expected a number above 0"),
        (RopeScaling, dict(factor=0.0), r"config.model.rope_scalings.factor = 0.0: expected a number above 0"),
        (RopeScaling, dict(high_frequency_factor=1.0), r"rope_scalings.high_frequency_factor = 1.0: expected above"),
        (TokenizerConfig, dict(model_type="char"), r"config.tokenizer.model_type"),
        (ObjectiveConfig, dict(hyper=dict(beta=math.nan)), r"config.objective.beta = nan: expected a finite number"),
        (ObjectiveConfig, dict(hyper=dict(beta=-0.1)), r"config.objective.beta = -0.1: expected a number above 0"),
        (ObjectiveConfig, dict(loss_weights=(math.inf,)), r"config.objective.loss_weights"),
        (ObjectiveConfig, dict(reference="frozen"), r"config.objective.reference = 'frozen': expected one of live"),
        (ObjectiveConfig, dict(head_chunk=0), r"config.objective.head_chunk"),
        (OptimizerConfig, dict(learning_rate=0.0), r"config.optimizer.learning_rate = 0.0"),
        (OptimizerConfig, dict(name="adam"), r"config.optimizer.name = 'adam': expected one of adamw, adafactor, lion"),
        (OptimizerConfig, dict(warmup_ratio=-0.1), r"config.optimizer.warmup_ratio = -0.1"),
        (OptimizerConfig, dict(weight_decay=math.nan), r"config.optimizer.weight_decay = nan"),
        (OptimizerConfig, dict(state_dtype="float16"), r"config.optimizer.state_dtype = 'float16': expected one of"),
        (OptimizerConfig, dict(name="adafactor", state_dtype="bfloat16"), r"state_dtype = 'bfloat16' has no effect on"),
        (TrainConfig, dict(epochs=0.0), r"config.train.epochs = 0.0"),
        (TrainConfig, dict(best_mode="lowest"), r"config.train.best_mode"),
        (TrainConfig, dict(stop_after_nonfinite=0), r"config.train.stop_after_nonfinite"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_an_error_that_names_the_key(make, given, message):
    with pytest.raises(ValueError, match=message):
        make(**given)


def test_configs_are_frozen_and_the_defaults_are_valid():
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.dim = 3
    assert config.sources == {}
    assert RunConfig(reference_from="sft", reverse_from="r").sources == {"reference": "sft", "reverse": "r"}
