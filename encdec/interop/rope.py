"""Rotary positions of Hugging Face configurations as fields of ours, and checks of their values."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from encdec.errors import DataError

_KNOWN = (
    "rope_type type rope_theta factor partial_rotary_factor original_max_position_embeddings "
    "max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate "
    "short_factor long_factor low_freq_factor high_freq_factor llama_4_scaling_beta "
    "mrope_section mrope_interleaved"
).split()
_STILL = 1e30  # divides a frequency so far that every angle is 0 in float32


def required(values: Mapping[str, Any], key: str, where: object, kind: type = int) -> Any:
    """The value of a required key of a configuration.

    Args:
        values: the configuration.
        key: its name.
        where: the file, and the part of it.
        kind: of the value; numbers (int, float) have to be positive.

    Raises:
        DataError: the key is absent or null, or its value is of another kind.
    """
    value = values.get(key)
    if value is None:
        raise DataError(
            f"{where} has no {key}; download the file again, or add the value that the model "
            "was made with"
        )
    kinds: Any = {int: int, float: (int, float)}.get(kind, kind)
    number = kind in (int, float)
    if not isinstance(value, kinds) or number and (isinstance(value, bool) or not value > 0):
        wanted = {
            int: "a positive whole number",
            float: "a positive number",
            dict: "an object",
            list: "a list",
        }[kind]
        raise DataError(f"{where} has {key} {value!r}, expected {wanted}; download the file again")
    return value


def read_rope(
    values: Mapping[str, Any],
    given: Callable[..., Any],
    head_dim: int,
    refuse: Callable[..., DataError],
    path: pathlib.Path,
) -> tuple[dict[str, Any], int, int]:
    """Our rotation fields, the longest sequence for which they are exact, and how many dimensions
    of a head are rotated (0: all)."""
    scaling = _scaling(values, refuse) or dict(given("rope_scaling", {}))
    theta = float(scaling.get("rope_theta") or given("rope_theta", 10_000.0))
    longest = whole = int(given("max_position_embeddings", 8192))
    stated = scaling.get("partial_rotary_factor") or values.get("partial_rotary_factor")
    partial = float(stated or given("partial_rotary_factor", 1.0))
    rotated = int(head_dim * partial)
    if not 0 < partial <= 1 or rotated < 2 or rotated % 2:
        why = f"not an even number of the {head_dim} dimensions of a head"
        raise refuse("partial_rotary_factor", partial, why)
    if partial < 1 and given("partial_rotary_factor") is None:
        raise refuse("partial_rotary_factor", partial, "which its family does not have")
    if scaling.get("llama_4_scaling_beta"):  # queries grow from the original length on
        longest = min(longest, int(required(scaling, "original_max_position_embeddings", path)))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "mrope" and scaling.get("mrope_section"):  # of images' places; texts have one
        kind = "default"
    if kind == "yarn" and scaling.get("short_factor"):  # as some of Phi-3's call it
        kind = "longrope"
    where = f"{path}, rope scaling {kind!r},"
    fields: dict[str, Any] = {"rope_theta": theta}
    divisors, magnitude = np.ones(rotated // 2), 1.0
    length = "original_max_position_embeddings"
    stated = {int(x) for x in (scaling.get(length), given(length)) if x}
    if len(stated) > 1:
        raise refuse(length, given(length), f"but {scaling[length]} in its RoPE settings")
    original = stated.pop() if stated else longest
    if kind == "linear":
        factor = float(required(scaling, "factor", where, float))
        if partial == 1:
            return fields | {"rope_scaling": "linear", "rope_factor": factor}, longest, 0
        divisors = divisors * factor
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        numbers = {
            key: required(scaling, key, where, float)
            for key in (*names, "original_max_position_embeddings")
        }
        divisors = np.array(_llama3_divisors(theta, rotated, numbers))
    elif kind in ("longrope", "su"):
        factor = float(scaling.get("factor") or whole / original)
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        stated = scaling.get("attention_factor")
        magnitude = grown if stated is None else stated
        divisors = np.array(required(scaling, "short_factor", where, list), np.float64)
        if divisors.shape != (rotated // 2,):
            raise refuse("short_factor", divisors.tolist(), f"expected {rotated // 2} numbers")
        # Beyond the original length the whole sequence would use other divisors.
        longest = original
    elif kind == "yarn":
        factor = scaling.get("factor") or whole / original
        divisors, magnitude = _yarn(theta, rotated, float(factor), original, scaling)
    elif kind == "dynamic":  # the base would change with each sequence longer than this
        pass
    elif kind != "default":
        kinds = "default, linear, dynamic, yarn, llama3, longrope"
        raise refuse("rope_scaling", kind, f"not one of {kinds}")
    if partial == 1 and kind in ("default", "dynamic"):
        return fields, longest, 0
    if partial < 1:  # pairs of whole heads: first the rotated ones, then those that are not rotated
        pairs = np.arange(head_dim // 2)
        wanted = theta ** (-np.arange(0, rotated, 2) / rotated) / divisors
        divisors = np.full(len(pairs), _STILL)
        divisors[: len(wanted)] = theta ** (-2 * pairs[: len(wanted)] / head_dim) / wanted
    fields |= {
        "rope_scaling": "per_pair",
        "rope_magnitude": float(magnitude),
        "rope_divisors": tuple(map(float, divisors)),
    }
    return fields, longest, rotated if partial < 1 else 0


def _scaling(values: Mapping[str, Any], refuse: Callable[..., DataError]) -> dict[str, Any]:
    """The rotary settings of layers that read all, from where transformers 5 and 4 have them."""
    parameters = dict(values.get("rope_parameters") or {})
    parameters = dict(parameters.get("full_attention") or parameters)
    older = dict(values.get("rope_scaling") or {})
    if "type" in older:
        older.setdefault("rope_type", older.pop("type"))
    if parameters and any(parameters.get(key, value) != value for key, value in older.items()):
        raise refuse("rope_scaling", older, f"but rope_parameters {parameters}; remove one of them")
    return parameters | older


def check_rope_kinds(
    values: Mapping[str, Any], apart: bool, refuse: Callable[..., DataError]
) -> None:
    """Refuses rotary settings that are ``apart`` for full and sliding layers in a family that has
    one for all, or one for all where it has two: transformers takes its defaults instead."""
    parameters = values.get("rope_parameters")
    if parameters and ("full_attention" in parameters) != apart:
        kinds = "those of full_attention and sliding_attention" if apart else "one for all layers"
        raise refuse("rope_parameters", parameters, f"expected {kinds}")


def unknown_rope_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys of the rotary settings, with the name of the object that has them, that mean nothing."""
    groups = {
        key: group for key in ("rope_parameters", "rope_scaling") if (group := values.get(key))
    }
    for key, group in list(groups.items()):
        if any(isinstance(inner, dict) for inner in group.values()):  # one for each kind of layers
            del groups[key]
            groups |= {f"{key}.{name}": inner for name, inner in group.items() if inner}
    return [
        f"{key}.{name}"
        for key, group in groups.items()
        for name, value in group.items()
        if name not in _KNOWN and value not in (None, False)
    ]


def _yarn(
    theta: float, rotated: int, factor: float, original: int, scaling: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    """YaRN's divisors and magnitude (arXiv 2309.00071, section 3.2, as transformers reads them):
    pairs with many turns in the original length are kept, slow ones stretched by the factor."""
    fast, slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)
    place = lambda turns: (
        rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    )
    low, high = place(fast), place(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    high += 0.001 * (low == high)
    stretched = np.clip((np.arange(rotated // 2) - low) / (high - low), 0, 1)
    rule = lambda weight: 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        one, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = rule(one) / rule(all_dim) if one and all_dim else rule(1)
    return 1 / (stretched / factor + (1 - stretched)), float(magnitude)


def _llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """Llama 3.1's rule: long waves are stretched by the factor, short ones kept, in between
    interpolated (as in ``_compute_llama3_parameters`` of transformers)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    # Turns within the length of the original training.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - kept) / scaling["factor"] + kept)).tolist())
