"""The reference of the tests: the papers' equations as naive loops in float64 NumPy.

Nothing here imports the package or JAX. A model is a flat dict `{path: array}`. `matrices` gives
the row axes and the column axes of some paths; AdamW trains all other paths.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Tree = dict[str, np.ndarray]
Axes = tuple[int, ...]

KELLER = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: np.ndarray, steps: int = 5) -> np.ndarray:
    """The paper's Eq. 2 for one matrix `[m, n]`."""
    a, b, c = KELLER
    norm = np.sqrt(np.sum(x**2))
    x = x / norm if norm > 0 else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def polar(x: np.ndarray) -> np.ndarray:
    """`U V^T` of the singular value decomposition, without the null space."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = int(np.sum(s > 1e-6 * s[0])) if s[0] > 0 else 0
    return u[:, :rank] @ vt[:rank]


def each_matrix(
    x: np.ndarray, rows: Axes, cols: Axes, function: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Apply a function of `[m, n]` to the matrices of `x`, one by one; other axes are batch."""
    batch = tuple(axis for axis in range(x.ndim) if axis not in rows + cols)
    order = batch + rows + cols
    stack = x.transpose(order)
    new = np.empty(stack.shape)
    fan_in = math.prod(x.shape[axis] for axis in rows)
    for index in itertools.product(*(range(x.shape[axis]) for axis in batch)):
        new[index] = function(stack[index].reshape(fan_in, -1)).reshape(stack[index].shape)
    return new.transpose(np.argsort(order))


def value_at(value: Any, step: int) -> float:
    """A hyperparameter at a step: the number itself, or the value of its schedule."""
    return float(value(step)) if callable(value) else float(value)


def train(
    params: Tree,
    gradients: Iterable[Tree],
    matrices: dict[str, tuple[Axes, Axes]],
    *,
    lr: Any,
    beta: Any = 0.95,
    nesterov: bool = True,
    decay: Any = 0.1,
    decayed: Callable[[str], bool] = lambda path: True,
    cautious: bool = False,
) -> Iterator[Tree]:
    """Muon (arXiv 2502.16982, Eq. 1-4) with AdamW(0.9, 0.95, 1e-8): the parameters at every step.

    `lr`, `beta` and `decay` are numbers or functions of the step, which counts from 0.
    """
    params = {path: np.asarray(p, np.float64) for path, p in params.items()}
    first = {path: np.zeros(p.shape) for path, p in params.items()}
    second = {path: np.zeros(p.shape) for path, p in params.items()}
    for step, gradient in enumerate(gradients):
        for path in params:
            g = np.asarray(gradient[path], np.float64)
            if path in matrices:
                first[path] = value_at(beta, step) * first[path] + g
                ahead = g + value_at(beta, step) * first[path] if nesterov else first[path]
                update = each_matrix(ahead, *matrices[path], _matched)
            else:
                first[path] = 0.9 * first[path] + 0.1 * g
                second[path] = 0.95 * second[path] + 0.05 * g**2
                mean = first[path] / (1 - 0.9 ** (step + 1))
                square = second[path] / (1 - 0.95 ** (step + 1))
                update = mean / (np.sqrt(square) + 1e-8)
            if decayed(path):
                pulls = update * params[path] >= 0 if cautious else True
                update = update + np.where(pulls, value_at(decay, step) * params[path], 0.0)
            params[path] = params[path] - value_at(lr, step) * update
        yield dict(params)


def _matched(matrix: np.ndarray) -> np.ndarray:
    """The update of one matrix with AdamW's RMS: Eq. 4."""
    return 0.2 * math.sqrt(max(matrix.shape)) * newton_schulz(matrix)


def normuon(updates: Iterable[np.ndarray], beta2: float = 0.95, eps: float = 1e-8) -> Iterator:
    """NorMuon (arXiv 2510.05491, Algorithm 1) after orthogonalization, for one matrix `[m, n]`.

    A neuron is a column: an output of the layer.
    """
    square: Any = 0.0
    for update in updates:
        fan_in, neurons = update.shape
        square = beta2 * square + (1 - beta2) * np.array(
            [sum(update[i, j] ** 2 for i in range(fan_in)) / fan_in for j in range(neurons)]
        )
        even = np.stack([update[:, j] / (np.sqrt(square[j]) + eps) for j in range(neurons)], axis=1)
        norm = np.linalg.norm(even)
        yield even * (np.linalg.norm(update) / norm if norm > 0 else 1.0)


def rms(x: np.ndarray) -> float:
    """Root mean square of all entries."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))
