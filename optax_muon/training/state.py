"""What training changes: parameters, the optimizer's state, router biases.

`abstract` is the state as shapes alone, so that a step compiles without a parameter in memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.models.mesh import batch_shards
from optax_muon.models.spec import Model


class State(NamedTuple):
    """Everything that training changes."""

    params: optax.Params
    """The parameters, float32."""
    opt_state: optax.OptState
    """The optimizer's state."""
    bias: jax.Array | None = None
    """Router biases, `[num_moe_layers, n_routed_experts]` float32; None if there is no router."""


def random_state(
    model: Model, tx: optax.GradientTransformation, seed: int, mesh: Mesh | None = None
) -> State:
    """The state of random parameters, on a mesh as `shardings` lays it out.

    The parameters are equal for every optimizer, and on every mesh up to rounding.
    """
    key = jax.random.key(seed)
    if mesh is None:
        return _jitted(model, tx, key)
    # XLA places the momenta where `out_shardings` puts them.
    on_mesh = functools.partial(draw, model, tx)
    return jax.jit(on_mesh, out_shardings=shardings(model, tx, mesh))(key)


def shardings(model: Model, tx: optax.GradientTransformation, mesh: Mesh) -> Any:
    """A `State` of `NamedSharding`s; the mesh must be ambient."""
    state, params = shapes(model, tx), model.shardings(mesh)
    opt_state = optax_muon.state_shardings(tx, state.params, params)
    bias: Any = None if state.bias is None else NamedSharding(mesh, P())
    return State(params, opt_state, bias)


def abstract(model: Model, tx: optax.GradientTransformation, mesh: Mesh | None) -> State:
    """The state as `ShapeDtypeStruct`s on a mesh, which must be ambient, or on one device."""
    if mesh is None:
        return shapes(model, tx)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes(model, tx),
        shardings(model, tx, mesh),
    )


def shapes(model: Model, tx: optax.GradientTransformation) -> State:
    """The state as `ShapeDtypeStruct`s without shardings."""
    # An abstract key: the ambient mesh may be of devices that this machine does not have.
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(functools.partial(draw, model, tx), key)


def stats_shapes(model: Model) -> Any:
    """What a forward pass reports besides its loss, as `ShapeDtypeStruct`s; None if nothing."""
    state = shapes(model, optax.identity())
    # Experts divide the batch over the devices of the ambient mesh: a sequence for each of them.
    tokens = jax.ShapeDtypeStruct([batch_shards(), model.config.context], jnp.int32)
    return jax.eval_shape(model.forward, state.params, tokens, state.bias)[1]


def draw(model: Model, tx: optax.GradientTransformation, key: jax.Array) -> State:
    """The state of random parameters on one device, to be jitted with `model` and `tx` static."""
    params = model.init(key)
    return State(params, tx.init(params), model.zero_bias())


_jitted = jax.jit(draw, static_argnums=(0, 1))
