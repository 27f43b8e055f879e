"""How labels, plans and runs show themselves in notebooks: escaped, no scripts, well-formed."""

import xml.etree.ElementTree as ElementTree

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.cli.reports import pictures
from optax_muon.cli.reports.plan import figure
from optax_muon.training.loop import StepMetrics
from optax_muon.training.run_folder import RunFolder

EVIL = "<script>alert('a & b')</script>"
PARAMS = {
    EVIL: {"kernel": jax.ShapeDtypeStruct((9, 64, 128), "float32")},
    "norm": jax.ShapeDtypeStruct((64,), "float32"),
}
VIEWS = {f"{EVIL}/kernel": optax_muon.View(1, 2)}


def planned(devices=8):
    mesh = AbstractMesh((devices,), ("fsdp",))
    shardings = {EVIL: {"kernel": P(None, "fsdp")}, "norm": P()}
    return optax_muon.plan(PARAMS, views=VIEWS, shardings=shardings, mesh=mesh)


def run(folder):
    found = RunFolder(folder / "run")
    found.path.mkdir()
    numbers = '{"lr": 0.1, "weight_decay": 0.3}'
    trial = f'{{"name": "muon", "title": "{EVIL}", "hyper_params": {numbers}}}'
    found.config.write_text(f'{{"trials": [{trial}]}}')
    found.journal.write("muon", StepMetrics(7, 2.5, 1.0, 0.1, 0.1, val_loss=3.25))
    return found


def shown(folder):
    return {"label": optax_muon.label(PARAMS, VIEWS), "plan": planned(), "run": run(folder)}


@pytest.mark.parametrize("name", ["label", "plan", "run"])
def test_what_is_shown_is_escaped_and_well_formed(name, tmp_path):
    text = shown(tmp_path)[name]._repr_html_()
    assert "<script" not in text and "&lt;script&gt;" in text
    root = ElementTree.fromstring(f"<div>{text}</div>")
    assert root.findall(".//td") and not root.findall(".//style")
    # Nothing but the half-transparent lines has a color, so it is read on white and on black.
    assert "color:inherit" in root.find(".//td").get("style")


def test_the_tables_have_what_is_printed(tmp_path):
    labels, plan, folder = shown(tmp_path).values()

    def cells(text):
        root = ElementTree.fromstring(f"<div>{text}</div>")
        return [["".join(cell.itertext()) for cell in row] for row in root.findall(".//tr")]

    found = cells(labels._repr_html_())
    assert [list(row.cells) for row in labels.rows] == found[1:3]
    assert cells(plan._repr_html_())[1][:2] == ["9 x (64 x 128)", "fsdp"]
    assert cells(folder._repr_html_())[1] == [EVIL, "0.1", "0.3", "7", "2.5000", "3.2500"]


def test_the_picture_stays_small_on_a_large_mesh():
    """Equal devices are one rectangle."""
    assert len(planned(devices=4096).picture().svg()) < 20_000


def test_the_picture_of_the_table_is_drawn_alike_by_both():
    """The SVG and the figure of the PNG have the same words; a figure's SVG never varies."""
    drawing = planned().picture("a title")
    svg = ElementTree.fromstring(drawing.svg())
    words = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    drawn = [text.get_text() for text in figure(drawing).axes[0].texts]
    assert words == drawn and "a title on 8 devices: fsdp 8" in words
    assert svg.find("{http://www.w3.org/2000/svg}title").text.startswith("a title on 8 devices")
    assert pictures.svg(figure(drawing)) == pictures.svg(figure(drawing))
