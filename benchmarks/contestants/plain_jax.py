"""A plain JAX step, as one writes it down: the prompt repeated, padding, full logits, `jax.grad`, optax."""

import argparse
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from safetensors.numpy import load_file

from benchmarks import cases
from benchmarks.contestants.padded import Padded, pad
from benchmarks.worker import Done, serve

PACKAGES = ("jax", "jaxlib", "optax", "numpy")


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x, angles):
    """Rotary positions: `x [B, S, H, E]`, `angles [S, E/2]`."""
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(x, weights, angles, heads):
    B, S, D = x.shape
    q, k, v = ((x @ weights[f"self_attn.{name}_proj.weight"].T).reshape(B, S, heads, -1) for name in "qkv")
    q, k = rotate(q, angles), rotate(k, angles)
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) / (D // heads) ** 0.5
    causal = jnp.tril(jnp.ones((S, S), bool))
    mixed = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1), v)
    return mixed.reshape(B, S, D) @ weights["self_attn.o_proj.weight"].T


def mlp(x, weights):
    gate, up = x @ weights["mlp.gate_proj.weight"].T, x @ weights["mlp.up_proj.weight"].T
    return (jax.nn.silu(gate) * up) @ weights["mlp.down_proj.weight"].T


def sequence_logps(params, batch: Padded, config):
    """Log-probability of each response, `[B]` nats."""
    heads, S = config["num_attention_heads"], batch.token.shape[1]
    width = config["hidden_size"] // heads
    params = jax.tree.map(lambda leaf: leaf.astype(config["compute_dtype"]), params)
    frequency = config["rope_theta"] ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.arange(S)[:, None] * frequency
    x = params["model.embed_tokens.weight"][batch.token]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        layer = {name.removeprefix(at): leaf for name, leaf in params.items() if name.startswith(at)}
        x = x + attention(rms_norm(x, layer["input_layernorm.weight"]), layer, angles, heads)
        x = x + mlp(rms_norm(x, layer["post_attention_layernorm.weight"]), layer)
    logits = rms_norm(x, params["model.norm.weight"]) @ params["lm_head.weight"].T
    logits = logits.astype(jnp.float32)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), batch.token[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(logps * batch.response[:, 1:], axis=1)


def dpo(params, reference, batch, config):
    """Chosen are the first half of the rows, rejected the second."""
    ratios = sequence_logps(params, batch, config) - jax.lax.stop_gradient(sequence_logps(reference, batch, config))
    chosen, rejected = jnp.split(ratios, 2)
    return -jnp.mean(jax.nn.log_sigmoid(cases.BETA * (chosen - rejected)))


def make_step(config, dtype="float32"):
    config = config | {"compute_dtype": dtype}
    tx = optax.chain(optax.clip_by_global_norm(cases.MAX_GRAD_NORM), optax.adamw(cases.LEARNING_RATE, weight_decay=0.0))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, reference, batch):
        loss, gradient = jax.value_and_grad(dpo)(params, reference, batch, config)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, optax.global_norm(gradient)

    return tx.init, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, required=True, help="pairs of a step")
    parser.add_argument("--multiple", type=int, default=1, help="what lengths are padded to: each is compiled once")
    flags = parser.parse_args()
    config = json.loads((flags.case / "config.json").read_text())
    params = jax.tree.map(jnp.asarray, load_file(flags.case / "model.safetensors"))
    reference = jax.tree.map(jnp.copy, params)  # the step gives its parameters away
    init, step = make_step(config, cases.read_dtype(flags.case))
    opt_state = init(params)
    rounds = cases.read_rounds(flags.case)

    def collate(pairs: Sequence[cases.Pair]) -> list[Padded]:
        starts = range(0, len(pairs), flags.batch)
        return [pad(pairs[i : i + flags.batch], flags.multiple) for i in starts]

    shapes = {batch.token.shape: batch for pairs in rounds for batch in collate(pairs)}
    compiled = {
        shape: step.lower(params, opt_state, reference, batch).compile() for shape, batch in shapes.items()
    }  # not timed

    def take(index: int) -> Done:
        nonlocal params, opt_state
        slots = 0
        for batch in collate(rounds[index]):
            run = compiled[batch.token.shape]
            params, opt_state, loss, norm = run(params, opt_state, reference, batch)
            slots += batch.token.size
        jax.block_until_ready((params, opt_state))
        work = cases.work(rounds[index]) | {"slots": slots}
        return Done({"loss": float(loss), "grad_norm": float(norm)}, work, {"ids": cases.digest(rounds[index])})

    same = {"weights": cases.weights_digest(flags.case)}
    serve(take, packages=PACKAGES, same=same, device=jax.devices()[0].device_kind, device_peak=device_peak)


def device_peak() -> int | None:
    statistics = jax.devices()[0].memory_stats()
    return statistics and statistics.get("peak_bytes_in_use")


if __name__ == "__main__":
    main()
