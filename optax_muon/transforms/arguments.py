"""What the arguments of an optimizer may be: ranges, dtypes, and functions that are no schedules.

Wrong arguments fail where they are given, by name. Numbers that are JAX arrays are not read: under
`optax.inject_hyperparams` they are traced, and elsewhere reading them would wait for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

F = TypeVar("F", bound=Callable[..., Any])


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    scheduled: bool = True,
) -> None:
    """Check a hyperparameter: a finite number within bounds, an array, or a schedule.

    Args:
        name: What errors call it.
        value: The argument.
        at_least: The smallest number.
        at_most: The largest number.
        above: A bound that is not reached.
        below: A bound that is not reached.
        scheduled: Whether it may be a schedule.

    Raises:
        TypeError: It is something else.
        ValueError: It is a number outside of the bounds, or not finite.

    >>> check_number("beta", 0.95, at_least=0, at_most=1)
    >>> check_number("beta", 1.5, at_least=0, at_most=1)
    Traceback (most recent call last):
    ValueError: beta is 1.5; it must be at least 0 and at most 1.
    """
    if isinstance(value, jax.Array) or (scheduled and callable(value)):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray):
        accepted = "a number or a schedule of the step" if scheduled else "a number"
        raise TypeError(f"{name} is {value!r}; it must be {accepted}.")
    if np.ndim(value):
        raise ValueError(f"{name} has the shape {np.shape(value)}; it must be one number.")
    if not (math.isfinite(value) and at_least <= value <= at_most and above < value < below):
        bounds = {"at least": at_least, "at most": at_most, "above": above, "below": below}
        words = [f"{word} {end:g}" for word, end in bounds.items() if math.isfinite(end)]
        raise ValueError(f"{name} is {value}; it must be {' and '.join(words) or 'finite'}.")


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is known to be 0: a number of Python's or NumPy's.

    >>> is_zero(0), is_zero(np.float32(0)), is_zero(0.1), is_zero(optax.constant_schedule(0.0))
    (True, True, False, False)
    """
    return not isinstance(value, jax.Array) and not callable(value) and bool(value == 0)


def check_mu_dtype(mu_dtype: jax.typing.DTypeLike | None) -> None:
    """Check the dtype of stored momenta.

    Raises:
        TypeError: It is not a dtype of real floating-point numbers.

    >>> check_mu_dtype(jnp.int32)
    Traceback (most recent call last):
    TypeError: mu_dtype is int32; it must be a floating-point dtype, such as bfloat16 or float32.
    """
    if mu_dtype is None:
        return
    try:
        floating = jnp.issubdtype(jnp.dtype(mu_dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        name = getattr(mu_dtype, "__name__", mu_dtype)
        raise TypeError(
            f"mu_dtype is {name}; it must be a floating-point dtype, such as bfloat16 or float32."
        )


def check_orthogonalizer(value: Any) -> None:
    """Check that an orthogonalizer can be called.

    Raises:
        TypeError: It cannot.
    """
    if not callable(value):
        raise TypeError(
            f"orthogonalizer is {value!r}; it must be a function of matrices [..., m, n]."
        )


def check_link(name: str, value: Any, accepted: str) -> None:
    """Check an optimizer or a link of one.

    Raises:
        TypeError: It is something else, such as `optax.adamw` without its call.

    >>> check_link("fallback", optax.adamw, "an optimizer")
    Traceback (most recent call last):
    TypeError: fallback is the function adamw; it must be an optimizer: call it, as in adamw(...).
    """
    if isinstance(value, optax.GradientTransformation):
        return
    if inspect.isroutine(value):
        found = value.__name__
        raise TypeError(
            f"{name} is the function {found}; it must be {accepted}: call it, as in {found}(...)."
        )
    raise TypeError(f"{name} is {value!r}; it must be {accepted}.")


@dataclasses.dataclass(frozen=True)
class _Static:
    """A function in a box, which `optax.inject_hyperparams` does not take for a schedule."""

    function: Any


class _StaticParameter(inspect.Parameter):
    """A parameter that is never a schedule: a function that it defaults to is in a box.

    The class is the mark, because copies keep it: `functools.partial` replaces the signature and
    the parameters that it binds by copies, whose defaults are what it binds.
    """

    @property
    def default(self) -> Any:
        default = super().default
        return default if default is inspect.Parameter.empty else _boxed(default)


class _StaticSignature(inspect.Signature):
    """A signature that puts functions into boxes as it binds static parameters."""

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if isinstance(self.parameters[name], _StaticParameter):
                bound.arguments[name] = _boxed(value)
        return bound


def static_args(*names: str) -> Callable[[F], F]:
    """Keep `optax.inject_hyperparams` from calling these arguments of a factory as schedules.

    Optax takes every callable argument for a schedule and calls it with the step, unless the user
    names it in `static_args`: a mask becomes False, and the decay is silently lost. Optax binds the
    arguments by the signature of the factory; this one puts functions into boxes, and the factory
    opens them.

    Args:
        names: Arguments that are never schedules.

    >>> @static_args("mask")
    ... def factory(learning_rate, mask=None):
    ...     return optax.masked(optax.sgd(learning_rate), mask)
    >>> def is_matrix(params):
    ...     return jax.tree.map(lambda x: x.ndim == 2, params)
    >>> tx = optax.inject_hyperparams(factory)(0.5, is_matrix)
    >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["kernel"][0, 0]), float(updates["bias"][0])
    (-0.5, 1.0)
    """

    def decorate(factory: F) -> F:
        @functools.wraps(factory)
        def opened(*args: Any, **kwargs: Any) -> Any:
            return factory(*map(_open, args), **{key: _open(v) for key, v in kwargs.items()})

        own = inspect.signature(factory)
        parameters = [
            _StaticParameter(name, each.kind, default=each.default, annotation=each.annotation)
            if name in names
            else each
            for name, each in own.parameters.items()
        ]
        signature = _StaticSignature(parameters, return_annotation=own.return_annotation)
        opened.__signature__ = signature  # type: ignore[attr-defined]
        return opened  # type: ignore[return-value]

    return decorate


def _boxed(value: Any) -> Any:
    return _Static(value) if callable(value) else value


def _open(value: Any) -> Any:
    return value.function if isinstance(value, _Static) else value
