"""Updates of a whole tree by optax transformations, compiled; and optax.contrib.muon as a peer."""

from __future__ import annotations

from typing import Any

import jax
import optax

from optax_muon.matrices import assign, paths

MUON = {"learning_rate": 1e-3, "weight_decay": 0.1}
"""Hyperparameters of every update; no time depends on them."""


def dimension_numbers(params: Any) -> Any:
    """What tells optax.contrib.muon the stack axes, and the leaves for AdamW."""
    views = assign.assign(params)

    def numbers(path: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        view = views[path]
        if view is None:
            return None
        bound = view.bind(leaf.shape)
        return optax.contrib.MuonDimensionNumbers(bound.row_axes, bound.col_axes)

    return paths.map_named(numbers, params)


def contrib_muon(params: Any, **options: Any) -> optax.GradientTransformation:
    """The same update by optax."""
    return optax.contrib.muon(
        **MUON,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimension_numbers(params),
        **options,
    )


def compile_update(tx: optax.GradientTransformation, params: Any) -> Any:
    """Compile `(params, state, grads) -> (params, state)`; parameters and state are donated."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


class Update:
    """An optimizer and its state: every call takes the next step."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any):
        self._step = compile_update(tx, jax.eval_shape(lambda: params))
        self._params, self._grads = jax.tree.map(lambda leaf: leaf.copy(), params), grads
        self._state = jax.jit(tx.init)(self._params)

    def __call__(self) -> Any:
        """Take one step."""
        self._params, self._state = self._step(self._params, self._state, self._grads)
        return self._params, self._state
