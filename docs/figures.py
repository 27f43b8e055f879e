"""The pictures of the documentation, computed by the library: `python docs/figures.py`.

Curves have the styles of `optax_muon.training.styles`, which can be told apart in black and white.
Texts stay texts in the SVG files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon import polar
from optax_muon.cli.reports import pictures
from optax_muon.drawing import Drawing
from optax_muon.training.styles import STYLES, Style

FOLDER = Path(__file__).parent / "pages" / "figures"
NAMED = dict(zip(("polar_express_8", "keller", "you", "polar_express"), STYLES, strict=False))
"""The styles of the tables of coefficients."""
SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def _figure(width: float = 7.2, height: float = 3.8) -> matplotlib.figure.Figure:
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def singular_values() -> matplotlib.figure.Figure:
    """What the steps of a table make of a singular value."""
    figure = _figure()
    axis = figure.subplots()
    sigma = np.geomspace(1e-4, 3e-2, 1000)
    for name, style in NAMED.items():
        table = polar.COEFFICIENTS[name]
        label = f"{name}, {len(table.rows)} steps"
        axis.semilogx(sigma, table(sigma), **style.curve(len(sigma)), label=label)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xlabel="singular value / Frobenius norm, before", ylabel="singular value, after")
    axis.set(ylim=(0, 1.3))
    axis.legend(loc="lower right")
    return figure


def spectrum() -> matplotlib.figure.Figure:
    """The singular values of a matrix like a gradient, before and after."""
    rows, cols = 128, 256
    random = np.random.default_rng(0)
    u = np.linalg.qr(random.normal(size=(rows, rows)))[0]
    v = np.linalg.qr(random.normal(size=(cols, rows)))[0]
    gradient = (u / np.arange(1, rows + 1)) @ v.T
    figure = _figure()
    axis = figure.subplots()

    def draw_spectrum(x: jax.typing.ArrayLike, label: str, style: Style) -> None:
        values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
        places = np.arange(1, rows + 1)
        axis.semilogy(places, values, **style.curve(rows), label=label)

    draw_spectrum(gradient / np.linalg.norm(gradient), "gradient, norm 1", STYLES[0])
    for name in ("keller", "polar_express"):
        update = polar.newton_schulz(jnp.asarray(gradient, jnp.float32), polar.COEFFICIENTS[name])
        draw_spectrum(update, f"update, {name}", NAMED[name])
    axis.set(xlabel="singular value, largest first", ylabel="size", ylim=(3e-3, 2))
    axis.legend(loc="lower left")
    return figure


def forms() -> matplotlib.figure.Figure:
    """Operations of the plain form and of the Gram form, by the shape of a matrix."""
    figure = _figure()
    axis = figure.subplots()
    ratios = np.array([1, 2, 3, 4, 6, 8, 12, 16])
    side = 512
    curves = {
        "plain form": polar.NewtonSchulz(form=polar.Plain()),
        "Gram form, bfloat16 (2 restarts)": polar.NewtonSchulz(
            form=polar.Gram(polar.default_restarts(5, jnp.bfloat16)), dtype=jnp.bfloat16
        ),
        "Gram form, float32 (1 restart)": polar.NewtonSchulz(
            form=polar.Gram(polar.default_restarts(5, jnp.float32)), dtype=jnp.float32
        ),
    }
    for (label, orthogonalizer), style in zip(curves.items(), STYLES, strict=False):
        flops = [
            orthogonalizer.count(side, side * int(ratio), platform="tpu").flops for ratio in ratios
        ]
        axis.plot(ratios, np.array(flops) / 1e9, **style.curve(len(ratios)), label=label)
    axis.set(xlabel=f"columns / rows, {side} rows", ylabel="GFLOP for five steps", ylim=(0, None))
    axis.legend(loc="upper left")
    return figure


def plan() -> Drawing:
    """A plan: which devices own which matrices."""
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))

    def leaf(shape: tuple[int, ...], *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    layers = {
        "q_proj": leaf((9, 1024, 1024), None, "fsdp", "tensor"),
        "up_proj": leaf((9, 1024, 4096), None, "fsdp", "tensor"),
        "down_proj": leaf((9, 4096, 1024), None, "tensor", "fsdp"),
        "norm": leaf((9, 1024)),
    }
    return optax_muon.plan({"layers": layers}, platform="tpu").picture("Nine layers")


FIGURES = {each.__name__: each for each in (singular_values, spectrum, forms, plan)}


def svg(figure: matplotlib.figure.Figure | Drawing) -> str:
    """The figure as an SVG that is the same in every run."""
    return figure.svg() + "\n" if isinstance(figure, Drawing) else pictures.svg(figure)


def main() -> None:
    """Draw all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*FIGURES, []], help="by default all of them")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the SVG files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(SETTINGS):
        for name in options.names or FIGURES:
            (options.out / f"{name}.svg").write_text(svg(FIGURES[name]()))


if __name__ == "__main__":
    main()
