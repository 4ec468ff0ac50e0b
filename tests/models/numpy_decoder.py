"""The decoder once more: float64, plain loops, a dense mask. What the tests hold the transformer against."""

import math

import numpy as np

from palign.attention.block_pairs import tree_mask


def frequencies(config, layer):
    """Rotary frequencies of one layer, Llama 3's rule written as in its release."""
    base = config.rope_bases[layer % len(config.rope_bases)]
    scaling = config.rope_scalings[layer % len(config.rope_scalings)]
    found = []
    for i in range(config.head_width // 2):
        frequency = 1.0 / base ** (2 * i / config.head_width)
        if scaling.original_length == 0:
            found.append(frequency / scaling.factor)
            continue
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_length / scaling.high_frequency_factor:
            found.append(frequency)
        elif wavelength > scaling.original_length / scaling.low_frequency_factor:
            found.append(frequency / scaling.factor)
        else:
            smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            found.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.array(found)


def rms_norm(config, x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon) * (config.norm_offset + scale)


def rotate(x, position, frequency):
    """`x [T, H, E]`: coordinate i and i + E/2 of a head turn together by `position * frequency[i]`."""
    half = x.shape[-1] // 2
    turned = np.empty_like(x)
    for i in range(half):
        cos, sin = np.cos(position * frequency[i])[:, None], np.sin(position * frequency[i])[:, None]
        turned[..., i] = x[..., i] * cos - x[..., i + half] * sin
        turned[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return turned


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def attention(config, p, x, position, mask, frequency):
    q, k, v = (np.einsum("td,dhe->the", x, p[name]["kernel"]) for name in ("query", "key", "value"))
    if config.attention_bias:
        q, k, v = (y + p[name]["bias"] for y, name in ((q, "query"), (k, "key"), (v, "value")))
    if config.qk_norm:
        q, k = rms_norm(config, q, p["query_norm"]["scale"]), rms_norm(config, k, p["key_norm"]["scale"])
    q, k = rotate(q, position, frequency), rotate(k, position, frequency)
    scale = 1 / math.sqrt(config.head_width) if config.query_scale is None else config.query_scale
    out = np.zeros_like(q)
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_key_heads)
        scores = capped(scale * q[:, head] @ k[:, shared].T, config.attention_softcap)
        for t in np.flatnonzero(mask.any(axis=1)):
            weights = np.exp(scores[t, mask[t]] - scores[t, mask[t]].max())
            out[t, head] = weights / weights.sum() @ v[mask[t], shared]
    return np.einsum("the,hed->td", out, p["output"]["kernel"])


def activation(config, x):
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_params(params, layer):
    return {name: layer_params(leaf, layer) if isinstance(leaf, dict) else leaf[layer] for name, leaf in params.items()}


def forward(config, params, token, position, group, branch):
    """One row: `(hidden [T, D], logits [T, V])`."""
    x = params["embedding"][token] * config.embedding_scale
    for layer in range(config.num_layers):
        p = layer_params(params["layers"], layer)
        mask = tree_mask(group, branch, position, config.windows[layer % len(config.windows)] or None)
        y = rms_norm(config, x, p["attention_norm"]["scale"])
        y = attention(config, p["attention"], y, position, mask, frequencies(config, layer))
        if config.norms_per_layer == 4:
            y = rms_norm(config, y, p["attention_post_norm"]["scale"])
        x = x + y
        y = rms_norm(config, x, p["mlp_norm"]["scale"])
        y = (activation(config, y @ p["mlp"]["gate"]["kernel"]) * (y @ p["mlp"]["up"]["kernel"])) @ p["mlp"]["down"][
            "kernel"
        ]
        if config.norms_per_layer == 4:
            y = rms_norm(config, y, p["mlp_post_norm"]["scale"])
        x = x + y
    hidden = rms_norm(config, x, params["final_norm"]["scale"])
    kernel = params["embedding"].T if config.tie_embedding else params["unembedding"]
    return hidden, capped(hidden @ kernel, config.final_softcap)[:, : config.vocab_size]
