"""Any optax chain as a Keras optimizer, on the JAX backend of Keras 3.

    optimizer = OptaxOptimizer(lambda: optax_muon.muon(3e-4))
    model.compile(optimizer, loss="mse")

The variables of the model become parameters by their paths, `dense_1/kernel` for instance, so
`label` and `views` read Keras's names of layers. Parts in front that all paths share are left out:
Keras puts the name of a model there, and not in every model that it has loaded. The state of the
chain is kept in variables of the optimizer: Keras saves, restores and shards them like those of its
own optimizers.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_muon.extras import require_extra
from optax_muon.matrices.paths import longest_suffix, named_leaves

require_extra("keras", "optax_muon.compat.keras")
os.environ.setdefault("KERAS_BACKEND", "jax")  # read once, when Keras is first imported

import keras  # noqa: E402

if keras.backend.backend() != "jax":
    raise ImportError(
        f"optax_muon.compat.keras needs Keras on JAX, and its backend is"
        f" {keras.backend.backend()!r}; set KERAS_BACKEND=jax before Keras is imported."
    )

__all__ = ["OptaxOptimizer", "params_of"]


def params_of(variables: Iterable[keras.Variable]) -> OrderedDict[str, jax.Array]:
    """The variables as parameters, `{path: array}`, for `label` and `plan`.

    Args:
        variables: Those of a model or a layer, such as `model.trainable_variables`.

    Returns:
        The values by the paths of the variables, in their order. What all paths share in front is
        left out, down to the name of a layer and of its variable.

    Raises:
        ValueError: two variables have the same path.

    >>> from optax_muon import label
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="up")])
    >>> print(label(params_of(model.trainable_variables)))
    path       shape   matrices  optimizer  reason
    up/kernel  [8, 4]  8 x 4     muon       matrix
    up/bias    [4]     -         adamw      bias
    <BLANKLINE>
    optimizer  leaves  parameters  share
    ...
    """
    # jax sorts the keys of a plain dictionary, and Keras loads a state by the order of variables,
    # which does not depend on their names.
    return OrderedDict((path, variable.value) for path, variable in _by_path(variables).items())


@keras.saving.register_keras_serializable(package="optax_muon")
class OptaxOptimizer(keras.optimizers.Optimizer):  # type: ignore[misc]
    """An optax chain for `model.compile`.

    The updates of the chain are multiplied by Keras's learning rate. Either the chain has the rate,
    and Keras's stays 1; or the chain has the rate 1, `optax_muon.muon(1.0)`, and Keras's schedules
    and callbacks set it.

    Args:
        transformation: A function without arguments that returns the chain. Keras saves it by its
            name: to load a model with its optimizer, register the function with
            `@keras.saving.register_keras_serializable()`, or give it to `load_model` in
            `custom_objects`.
        learning_rate: A number, a schedule of Keras's or a function without arguments; multiplies
            the updates.
        name: The name of the optimizer, and of the scope of its variables.
        **options: Keras's own, such as `clipnorm`, `use_ema` or `gradient_accumulation_steps`.

    Raises:
        TypeError: `transformation` is a chain, and not a function that returns one.
        ValueError: (in `build`) two variables of the model have the same path.

    >>> from optax_muon import muon
    >>> optimizer = OptaxOptimizer(lambda: muon(3e-4))
    >>> optimizer.build([keras.Variable(jnp.ones((4, 8)), name="kernel")])
    >>> [variable.name for variable in optimizer.variables if variable.shape == (4, 8)]
    ['inner_states_muon_inner_state_0_0_mu_kernel']
    """

    def __init__(
        self,
        transformation: Callable[[], optax.GradientTransformation],
        learning_rate: Any = 1.0,
        name: str = "optax_optimizer",
        **options: Any,
    ) -> None:
        if not callable(transformation):
            raise TypeError(
                f"transformation is a {type(transformation).__name__}; it must be a function"
                " without arguments that returns one, such as lambda: optax_muon.muon(3e-4)."
            )
        super().__init__(learning_rate=learning_rate, name=name, **options)
        self.transformation = transformation
        self._chain = transformation()

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make the variables that hold the state of the chain.

        Args:
            variables: The trainable variables of the model.
        """
        if self.built:
            return
        super().build(variables)
        trained = _by_path(v for v in variables if _is_trained(v))
        self._paths = {id(variable): path for path, variable in trained.items()}
        state = self._chain.init(params_of(trained.values()))
        self._structure = jax.tree.structure(state)
        self._state = [
            self._state_variable(path, leaf, trained) for path, leaf in named_leaves(state).items()
        ]

    def _state_variable(
        self, name: str, leaf: jax.Array, trained: Mapping[str, keras.Variable]
    ) -> keras.Variable:
        """A leaf of the state; a momentum is laid out like its variable."""
        like = trained.get(longest_suffix(trained, name) or "")
        same = like is not None and tuple(like.shape) == leaf.shape
        return self.add_variable(
            shape=leaf.shape,
            # A copy of its own, because Keras donates it.
            initializer=lambda shape, dtype=None: jnp.array(leaf, dtype),
            dtype=leaf.dtype.name,
            layout=getattr(like, "_layout", None) if same else None,
            name=name.replace("/", "_"),
        )

    def _backend_update_step(
        self,
        grads: Sequence[jax.Array],
        trainable_variables: Sequence[keras.Variable],
        learning_rate: Any,
    ) -> None:
        """One step of the chain: the hook in which Keras's backends take all variables at once.

        Variables without a gradient keep their values; the chain is shown a gradient of zero.
        """
        given = {self._paths[id(v)]: g for v, g in zip(trainable_variables, grads, strict=True)}
        params = params_of(v for v in self._trainable_variables if _is_trained(v))
        whole = OrderedDict((p, given.get(p, jnp.zeros_like(x))) for p, x in params.items())
        state = jax.tree.unflatten(self._structure, [v.value for v in self._state])
        updates, state = self._chain.update(whole, state, params)
        for variable in trainable_variables:
            path = self._paths[id(variable)]
            rate = jnp.asarray(learning_rate, updates[path].dtype)
            variable.assign(optax.apply_updates(params[path], rate * updates[path]))
        for variable, leaf in zip(self._state, jax.tree.leaves(state), strict=True):
            variable.assign(leaf)

    def get_config(self) -> dict[str, Any]:
        """Keras's settings, and the function that makes the chain."""
        return {
            **super().get_config(),
            "transformation": keras.saving.serialize_keras_object(self.transformation),
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> OptaxOptimizer:
        """The optimizer of a config; its function is found by its name."""
        make = keras.saving.deserialize_keras_object(
            config["transformation"], custom_objects=custom_objects
        )
        return super().from_config({**config, "transformation": make}, custom_objects)


def _is_trained(variable: keras.Variable) -> bool:
    """Whether its gradient is one: Keras gives scales of quantized layers theirs as values."""
    return not getattr(variable, "overwrite_with_gradient", False)


def _by_path(variables: Iterable[keras.Variable]) -> dict[str, keras.Variable]:
    listed = list(variables)
    parts = [variable.path.split("/") for variable in listed]
    same = [len(set(level)) == 1 for level in zip(*parts, strict=False)]
    shared = min([*same, False].index(False), max(0, len(same) - 2))
    found: dict[str, keras.Variable] = {}
    for variable, path in zip(listed, parts, strict=True):
        name = "/".join(path[shared:])
        if name in found:
            raise ValueError(f"Two variables have the path {variable.path!r}; rename a layer.")
        found[name] = variable
    return found
