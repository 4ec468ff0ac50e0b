"""Ten optimizer steps against TRL's own DPOTrainer: the same weights, pairs and settings must give the same numbers.

`make_trl_fixture.py` recorded TRL's side. Two definitions differ: TRL's `num_tokens` counts a prompt once per response
and adds up over the run, palign's counts the tokens of a step's rows; TRL's `mean_token_accuracy` looks at the chosen
responses, palign's at every response. Everything else, the weights after ten steps included, agrees to rounding.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from palign.config.schema import ModelConfig, OptimizerConfig
from palign.data.pack import pack_row, row_shape, stack_rows
from palign.data.tokenize import TokenTree
from palign.heads.target_values import target_logps
from palign.models.config import padded_vocabulary
from palign.models.transformer import make_language_model
from palign.objectives.compose import make_objective
from palign.sharding.mesh import make_mesh, to_global
from palign.sharding.rules import parameter_shardings
from palign.train.metrics import to_floats
from palign.train.optimizer import learning_rate_schedule, make_optimizer
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step

HERE = pathlib.Path(__file__).parent
RUNS = ("sigmoid", "ipo", "sigmoid_sft")
# Layout of a step's four pairs: name -> (pairs in a row, layout of a pair). The first is TRL's.
LAYOUTS = {"repeated": (1, "unshared"), "tree_a_row": (1, "packed"), "packed": (4, "packed")}
# Both sides compute in float32: a sum of log-probabilities near -50 carries 1e-5 of rounding, a reward a tenth of that.
TOLERANCES = {
    "loss": {"rtol": 1e-5},
    "grad_norm": {"rtol": 2e-5},
    "logps/chosen": {"rtol": 2e-6},
    "logps/rejected": {"rtol": 2e-6},
    "rewards/chosen": {"rtol": 1e-5, "atol": 1e-5},
    "rewards/rejected": {"rtol": 1e-5, "atol": 1e-5},
    "rewards/margins": {"rtol": 1e-5, "atol": 1e-5},
    "entropy": {"rtol": 1e-5},
}


@functools.cache
def fixture():
    with np.load(HERE / "trl_trajectory.npz") as file:
        return json.loads((HERE / "trl_trajectory.json").read_text()), dict(file)


def model_config(run) -> ModelConfig:
    sizes = fixture()[0]["shared"]["sizes"]
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        num_layers=sizes["num_hidden_layers"],
        dim=sizes["hidden_size"],
        num_heads=sizes["num_attention_heads"],
        num_key_heads=sizes["num_key_value_heads"],
        hidden_dim=sizes["intermediate_size"],
        norm_epsilon=sizes["rms_norm_eps"],
        rope_bases=(sizes["rope_parameters"]["rope_theta"],),
        tie_embedding=run["tied"],
        attention_bias=run["family"] == "qwen2",
        dtype="float32",
    )


def optimizer_config() -> OptimizerConfig:
    shared = fixture()[0]["shared"]
    return OptimizerConfig(
        learning_rate=shared["learning_rate"],
        schedule="linear",
        warmup_steps=shared["warmup_steps"],
        warmup_ratio=None,
        weight_decay=shared["weight_decay"],
        b1=shared["adam_beta1"],
        b2=shared["adam_beta2"],
        eps=shared["adam_epsilon"],
        max_grad_norm=shared["max_grad_norm"],
    )


def weights(config: ModelConfig, prefix: str):
    """transformers' tensors `[out, in]` as palign's parameters: transposed, heads apart, stacked over layers."""
    tensors, width = fixture()[1], config.head_width

    def stacked(name, shape=None):
        layers = [tensors[f"{prefix}/model.layers.{i}.{name}"].T for i in range(config.num_layers)]
        return np.stack([layer if shape is None else layer.reshape(shape) for layer in layers])

    def projection(name, heads):
        out = {"kernel": stacked(f"self_attn.{name}.weight", (config.dim, heads, width))}
        return out | ({"bias": stacked(f"self_attn.{name}.bias", (heads, width))} if config.attention_bias else {})

    padding = ((0, padded_vocabulary(config) - config.vocab_size), (0, 0))
    params = {
        "embedding": np.pad(tensors[f"{prefix}/model.embed_tokens.weight"], padding),
        "final_norm": {"scale": tensors[f"{prefix}/model.norm.weight"]},
        "layers": {
            "attention_norm": {"scale": stacked("input_layernorm.weight")},
            "mlp_norm": {"scale": stacked("post_attention_layernorm.weight")},
            "attention": {
                "query": projection("q_proj", config.num_heads),
                "key": projection("k_proj", config.num_key_heads),
                "value": projection("v_proj", config.num_key_heads),
                "output": {"kernel": stacked("self_attn.o_proj.weight", (config.num_heads, width, config.dim))},
            },
            "mlp": {name: {"kernel": stacked(f"mlp.{name}_proj.weight")} for name in ("gate", "up", "down")},
        },
    }
    if not config.tie_embedding:
        params["unembedding"] = np.pad(tensors[f"{prefix}/lm_head.weight"], padding).T
    return params


def make_batch(step, layout: str):
    """One step's pairs as rows `[R, ...]`."""
    trees_a_row, tree_layout = LAYOUTS[layout]
    shape = row_shape(64 * trees_a_row, trees=trees_a_row, responses=2, block=16)
    trees = [
        TokenTree(np.asarray(prompt, np.int32), tuple(np.asarray(ids, np.int32) for ids in both), (1.0, 0.0), i)
        for i, (prompt, *both) in enumerate(step["pairs"])
    ]
    rows = [trees[i : i + trees_a_row] for i in range(0, len(trees), trees_a_row)]
    return stack_rows([pack_row(row, shape, "best_worst", tree_layout, seed=0) for row in rows])


def train(run, params, config, layout):
    """palign's own objective, optimizer and step over the recorded pairs: metrics of every step, and the end."""
    lm, mesh = make_language_model(config), make_mesh(data=1, devices=jax.devices()[:1])
    tx = make_optimizer(optimizer_config(), len(run["steps"]))
    objective = make_objective(
        lm, run["loss_type"], loss_weights=run["loss_weights"], hyper={"beta": fixture()[0]["shared"]["beta"]}, chunk=32
    )
    aux_shardings = {"reference": parameter_shardings(mesh, params)}
    step = make_train_step(objective, tx, mesh, state_shardings(mesh, lm, tx), aux_shardings)
    aux = jax.device_put({"reference": params}, aux_shardings)
    state, metrics = init_state(mesh, lm, tx, seed=0, params=params), []
    for recorded in run["steps"]:
        batch = jax.tree.map(lambda x: x[None], make_batch(recorded, layout))
        state, out = step(state, aux, to_global(mesh, batch))
        metrics.append(to_floats(out))
    return metrics, jax.device_get(state.params)


def leaves(*trees):
    """(path, the leaves of all trees there), for each path."""
    flat = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
    for same in zip(*flat, strict=True):
        yield jax.tree_util.keystr(same[0][0]), [leaf for _, leaf in same]


def column(steps, name):
    return np.array([step[name] for step in steps])


@pytest.mark.parametrize("run_name", RUNS)
def test_log_probabilities_at_the_start_are_those_of_transformers(run_name):
    run = fixture()[0]["runs"][run_name]
    config = model_config(run)
    lm, params = make_language_model(config), weights(config, f"{run['family']}/before")
    batch = make_batch(run["steps"][0], "packed")
    logps = jax.jit(lambda p, b: target_logps(lm.hidden(p, b), lm.unembed(p), b, chunk=32))(params, batch)
    ours = np.asarray(logps)[batch.target_slot > 0]
    np.testing.assert_allclose(ours, np.concatenate(run["first_logps"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("run_name", "layout"), [*((run, "tree_a_row") for run in RUNS), ("sigmoid", "packed")])
def test_ten_steps_agree_with_trl(run_name, layout):
    run = fixture()[0]["runs"][run_name]
    config = model_config(run)
    before, after = (weights(config, prefix) for prefix in (f"{run['family']}/before", f"{run_name}/after"))
    metrics, params = train(run, before, config, layout)
    steps = run["steps"]
    for name, tolerance in TOLERANCES.items():
        np.testing.assert_allclose(column(metrics, name), column(steps, name), **tolerance, err_msg=name)
    accuracies = [column(side, "rewards/accuracies") for side in (metrics, steps)]
    np.testing.assert_array_equal(*accuracies)
    assert not accuracies[0][:2].any()  # policy and reference are equal: a strict > counts nothing
    for path, (end, theirs, start) in leaves(params, after, before):
        moved = np.max(np.abs(theirs - start))
        assert moved > 1e-3, path
        assert np.max(np.abs(end - theirs)) <= 3e-4 * moved, path


def test_learning_rates_are_those_of_trl():
    """Warm-up starts at 0, so TRL's first step, and ours, leaves the weights as they were."""
    for run in fixture()[0]["runs"].values():
        rate = learning_rate_schedule(optimizer_config(), len(run["steps"]))
        ours = [float(rate(step)) for step in range(len(run["steps"]))]
        np.testing.assert_allclose(ours, column(run["steps"], "learning_rate"), rtol=1e-6)
        assert ours[0] == 0.0


def test_num_tokens_of_repeated_prompts_are_those_of_trl():
    """TRL counts every prompt once per response, and adds up over the run."""
    for run in fixture()[0]["runs"].values():
        tokens = [int((make_batch(step, "repeated").group > 0).sum()) for step in run["steps"]]
        np.testing.assert_array_equal(np.cumsum(tokens), column(run["steps"], "num_tokens"))
