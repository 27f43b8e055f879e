"""The pictures of the documentation, computed by the library: `python docs/figures.py`.

Curves differ in line style as well as in color, bars in hatching; the colors are those of Okabe and
Ito, which differ for all eyes and in grey. Texts stay texts in the SVG files.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
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
from optax_muon.cli.reports.plan import draw

FOLDER = Path(__file__).parent / "pages" / "figures"
STYLES = {
    "keller": ("#0072b2", "-"),
    "you": ("#e69f00", "--"),
    "polar_express": ("#009e73", "-."),
    "polar_express_8": ("#000000", ":"),
}
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "optax-muon",
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
    for name, (color, line) in STYLES.items():
        table = polar.COEFFICIENTS[name]
        label = f"{name}, {len(table.rows)} steps"
        axis.semilogx(sigma, table(sigma), color=color, linestyle=line, label=label)
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

    def draw_spectrum(x: jax.typing.ArrayLike, label: str, color: str, line: str) -> None:
        values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
        places = np.arange(1, rows + 1)
        axis.semilogy(places, values, color=color, linestyle=line, label=label)

    draw_spectrum(gradient / np.linalg.norm(gradient), "gradient, norm 1", "#000000", ":")
    for name in ("keller", "polar_express"):
        color, line = STYLES[name]
        update = polar.newton_schulz(jnp.asarray(gradient, jnp.float32), polar.COEFFICIENTS[name])
        draw_spectrum(update, f"update, {name}", color, line)
    axis.set(xlabel="singular value, largest first", ylabel="size", ylim=(3e-3, 2))
    axis.legend(loc="lower left")
    return figure


def forms() -> matplotlib.figure.Figure:
    """Operations of the plain form and of the Gram form, by the shape of a matrix."""
    figure = _figure()
    axis = figure.subplots()
    ratios = np.array([1, 2, 3, 4, 6, 8, 12, 16])
    side = 512
    curves: dict[str, tuple[Callable[[str], polar.NewtonSchulz], str, str]] = {
        "plain form": (lambda _: polar.NewtonSchulz(form=polar.Plain()), "#000000", "-"),
        "Gram form, bfloat16 (2 restarts)": (
            lambda _: polar.NewtonSchulz(
                form=polar.Gram(polar.default_restarts(5, jnp.bfloat16)), dtype=jnp.bfloat16
            ),
            "#d55e00",
            "--",
        ),
        "Gram form, float32 (1 restart)": (
            lambda _: polar.NewtonSchulz(
                form=polar.Gram(polar.default_restarts(5, jnp.float32)), dtype=jnp.float32
            ),
            "#0072b2",
            "-.",
        ),
    }
    for label, (make, color, line) in curves.items():
        orthogonalizer = make(label)
        flops = [
            orthogonalizer.count(side, side * int(ratio), platform="tpu").flops for ratio in ratios
        ]
        axis.plot(ratios, np.array(flops) / 1e9, color=color, linestyle=line, label=label)
    axis.set(xlabel=f"columns / rows, {side} rows", ylabel="GFLOP for five steps", ylim=(0, None))
    axis.legend(loc="upper left")
    return figure


def plan() -> matplotlib.figure.Figure:
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
    return draw(optax_muon.plan({"layers": layers}, platform="tpu"), "Nine layers")


FIGURES = {each.__name__: each for each in (singular_values, spectrum, forms, plan)}


def svg(figure: matplotlib.figure.Figure) -> str:
    """The figure as an SVG that is the same in every run."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"


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
