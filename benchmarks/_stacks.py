"""Stacks of matrices through Newton-Schulz, ours and optax's, compiled."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import _bench
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import _muon as contrib

import optax_muon
from optax_muon.polar import KELLER, Form, Plain, choose_form


@dataclasses.dataclass(frozen=True)
class Case:
    """A stack of matrices, and the dtype of the products' operands."""

    batch: int
    rows: int
    cols: int
    operands: str

    def __str__(self) -> str:
        return f"{self.batch} x {self.rows} x {self.cols} {self.operands}"

    @property
    def plain_flops(self) -> int:
        """Operations of the plain form on the whole stack."""
        return self.batch * Plain().count(*self.sides, KELLER.rows).flops

    @property
    def form(self) -> Form:
        """The form that `newton_schulz` chooses."""
        return choose_form(
            *self.sides, KELLER.rows, dtype=self.operands, platform=jax.default_backend()
        )

    @property
    def sides(self) -> tuple[int, int]:
        """Short and long side."""
        return min(self.rows, self.cols), max(self.rows, self.cols)

    def normal(self) -> np.ndarray:
        """The stack, standard normal."""
        draw = np.random.default_rng(0)
        return draw.standard_normal((self.batch, self.rows, self.cols), np.float32)


def ours(x: np.ndarray, operands: str, form: Form) -> _bench.Implementation:
    """A stack through the link of our chain."""
    orthogonalizer = functools.partial(optax_muon.newton_schulz, dtype=operands, form=form)
    link = optax_muon.orthogonalize(orthogonalizer, views=optax_muon.View(1, 2))

    def run(x: jax.Array) -> jax.Array:
        return link.update({"matrices": x}, optax.EmptyState())[0]["matrices"]

    return compiled(run, x)


def of_optax(x: np.ndarray, operands: str) -> _bench.Implementation:
    """A stack through optax's function."""
    dimensions = optax.contrib.MuonDimensionNumbers(1, 2)
    coefficients = jnp.asarray(KELLER.rows[0])

    def run(x: jax.Array) -> jax.Array:
        return contrib.orthogonalize_via_newton_schulz(
            x.astype(operands), coefficients, dimension_numbers=dimensions
        ).astype(x.dtype)

    return compiled(run, x)


def compiled(function: Any, x: np.ndarray) -> _bench.Implementation:
    """A compiled function with its argument."""
    return functools.partial(jax.jit(function).lower(x).compile(), jnp.asarray(x))
