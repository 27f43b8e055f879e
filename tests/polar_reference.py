"""Truth for the polar tests: matrices of known spectrum, and a naive float64 loop over them."""

import numpy as np
import pytest

from optax_muon.polar import COEFFICIENTS, Coefficients

every_table = pytest.mark.parametrize("table", COEFFICIENTS.values(), ids=COEFFICIENTS.keys())
not_finite = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


def orthonormal(rows, columns, seed):
    """Return float64 orthonormal columns, or rows where the matrix is wide."""
    tall = np.random.default_rng(seed).normal(size=(max(rows, columns), min(rows, columns)))
    q = np.linalg.qr(tall)[0]
    return q if rows >= columns else q.T


def with_spectrum(sigma, rows, columns, seed=0):
    """Return float64 U, sigma, V^T and their product."""
    u = orthonormal(rows, len(sigma), seed)
    vt = orthonormal(len(sigma), columns, seed + 1)
    return u, np.asarray(sigma, np.float64), vt, (u * sigma) @ vt


def gaussian_spectrum(rows, columns, seed=0):
    return np.linalg.svd(np.random.default_rng(seed).normal(size=(rows, columns)))[1]


def low_rank_with_noise(size, rank=8, noise=1e-2):
    sigma = np.full(size, noise) * np.linspace(0.5, 1.5, size)
    sigma[:rank] = np.linspace(1, 2, rank)
    return sigma


SPECTRA = {
    "gaussian": with_spectrum(gaussian_spectrum(96, 288), 96, 288),
    "power law": with_spectrum(1 / np.arange(1, 97), 96, 288),
    "log-spaced to 1e-4": with_spectrum(np.geomspace(1, 1e-4, 96), 96, 288),
    "rank one": with_spectrum(np.eye(96)[0], 96, 288),
    "rank eight and noise": with_spectrum(low_rank_with_noise(96), 96, 288),
    "32 to 1": with_spectrum(gaussian_spectrum(32, 1024), 32, 1024),
}

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def true_update(u, sigma, vt, table: Coefficients, steps=None):
    """Return U p(sigma) V^T in float64: what an iteration without rounding computes."""
    return (u * table(sigma / np.linalg.norm(sigma), steps)) @ vt


def naive_loop(x, rows, safety=1.0, rounded=lambda each: each):
    """Orthogonalize a float64 matrix as the paper writes it; `rounded` is what operands become."""
    x = rounded(np.asarray(x, np.float64) / (safety * np.linalg.norm(x)))
    for a, b, c in rows:
        gram = rounded(x @ x.T)
        x = rounded(a * x + rounded(b * gram + c * gram @ gram) @ x)
    return x


def relative_error(found, truth):
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)
