"""Checks of the numbers in a model's config, before they become shapes."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any


def size_refusals(config: Any, least: Mapping[str, int] | None = None) -> Iterator[str]:
    """A sentence for every number of a config that no model can have.

    Args:
        config: A dataclass; its fields annotated `int` are sizes, those annotated `float` numbers.
        least: The smallest value of sizes that may be smaller than 1.

    >>> from optax_muon.models.llama import LlamaConfig
    >>> LlamaConfig(16, 2, 0, num_key_value_heads=1, intermediate_size=32, context=8)
    Traceback (most recent call last):
      ...
    ValueError: num_attention_heads is 0; it must be a whole number of at least 1
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        smallest = (least or {}).get(field.name, 1)
        if kind.startswith("int") and not _is_whole(value, smallest):
            yield f"{field.name} is {value!r}; it must be a whole number of at least {smallest}"
        if kind.startswith("float") and not _is_finite(value):
            yield f"{field.name} is {value!r}; it must be a finite number"


def _is_whole(value: Any, smallest: int) -> bool:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_integer and value >= smallest


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)
