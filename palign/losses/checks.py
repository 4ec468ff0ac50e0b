"""What every loss does before its formula: upcast, take log-ratios, refuse wrong shapes and impossible numbers."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def as_float(values: Array) -> Float[Array, "..."]:
    """Return `values` in at least float32: bf16, f16 and integers are raised, f32 and f64 are kept."""
    values = jnp.asarray(values)
    wide = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize >= 4
    return values if wide else values.astype(jnp.float32)


def log_ratios(policy_logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `rho = policy_logps - ref_logps` in nats; no gradient reaches the reference."""
    return as_float(policy_logps) - jax.lax.stop_gradient(as_float(ref_logps))


def margins(ratios: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """Return chosen minus rejected: `h = rho_w - rho_l`."""
    return ratios[:, 0] - ratios[:, 1]


def check_pairs(loss: str, **arrays: Array) -> None:
    """Raise ValueError, naming the loss and the argument, unless every array is `[B, 2]` with the same B."""
    for name, array in arrays.items():
        remedy = ". Sum token log-probs over the response first (losses.dense.sequence_logps)"
        expected = "[B, 2] with column 0 = chosen, column 1 = rejected" + (remedy if name.endswith("logps") else "")
        check_shape(loss, expected, (None, 2), **{name: array})
    check_same_shape(loss, **arrays)


def check_lists(loss: str, valid: Bool[Array, "B K"], **arrays: Array) -> None:
    """Raise ValueError unless every array is `[B, K]`, the same for all, and `valid` is boolean of that shape."""
    check_shape(loss, "[B, K], one row per prompt", (None, None), **arrays)
    check_mask(loss, "valid", valid)
    check_same_shape(loss, **arrays, valid=valid)


def check_scalars(loss: str, **values: float | Float[Array, ""]) -> None:
    """Raise ValueError unless every value is a scalar: one for the whole batch, not one per example or device."""
    check_shape(loss, "a scalar of the whole batch, []", (), **values)


def check_shape(loss: str, expected: str, shape: tuple[int | None, ...], **arrays: Array | float) -> None:
    """Raise ValueError, naming the loss, the argument and what was expected, unless every array has the shape.

    None in `shape` is an axis of any length.
    """
    for name, array in arrays.items():
        message = f"{loss}: {name} has shape {list(jnp.shape(array))}; expected {expected}"
        _refuse(message, chex.assert_shape, array, shape)


def check_same_shape(loss: str, **arrays: Array) -> None:
    """Raise ValueError unless all arrays have one shape: silent broadcasting would hide a transposed argument."""
    shapes = ", ".join(f"{name} {list(jnp.shape(array))}" for name, array in arrays.items())
    _refuse(f"{loss}: all shapes must be equal, got {shapes}", chex.assert_equal_shape, list(arrays.values()))


def check_mask(loss: str, name: str, mask: Bool[Array, "*shape"]) -> None:
    """Raise ValueError unless `mask` is boolean: 0/1 numbers invite `mask * x`, where `inf * 0` is NaN."""
    check_type(loss, f"bool (True = keep), for example {name} != 0", bool, **{name: mask})


def check_type(loss: str, expected: str, kind: type, **arrays: Array) -> None:
    """Raise ValueError unless every array is of that kind: bool, int or float of any width."""
    for name, array in arrays.items():
        message = f"{loss}: {name} has dtype {jnp.result_type(array)}; expected {expected}"
        _refuse(message, chex.assert_type, array, kind)


def check_positive(loss: str, **values: float | Float[Array, ""]) -> None:
    """Raise ValueError if a plain number is not finite and above zero; traced values cannot be looked at."""
    for name, value in values.items():
        if isinstance(value, numbers.Real) and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{loss}: {name} is {value}; expected a finite number above 0")


def check_between(loss: str, low: float, high: float, **values: float | Float[Array, ""]) -> None:
    """Raise ValueError if a plain number is not finite and in [low, high]; traced values cannot be looked at."""
    for name, value in values.items():
        if isinstance(value, numbers.Real) and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{loss}: {name} is {value}; expected a finite number in [{low}, {high}]")


def _refuse(message: str, assertion: Callable[..., None], *arguments: Any) -> None:
    """Raise ValueError with our message alone: chex puts its own before it, which names no argument."""
    try:
        assertion(*arguments)
    except AssertionError:
        raise ValueError(message) from None
