"""The time that a plan models, held to what the compiler for TPUs estimates of the program.

An update takes the cycles of its products and of everything else, and the exposed time of messages
at the plan's rate of the links: rows of a committed table.
"""

import csv
import dataclasses
import inspect
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.models import abstract, spec
from optax_muon.platforms import KINDS, PLATFORMS

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "tpu_ahead_of_time.csv"
CLOCK = {"v5p": 1.75e9, "v5e": 1.5e9, "v6e": 1.75e9}
KIND = {"v5p": "TPU v5", "v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}
MODELS = {
    "Llama 3 8B": ("llama3-8b", {}),
    "Llama 3 8B, scanned": ("llama3-8b", {}),
    "Moonlight 16B": ("moonlight-16b-a3b", {}),
    "4 layers of Llama 3 1B, scanned": ("llama3-1b", {"num_hidden_layers": 4}),
}
"""Name of the configuration, and what is changed of it."""


def committed():
    """The rows with cycles, by tree and machine, but for slices: types do not tell them apart."""
    with TABLE.open() as file:
        rows = [row for row in csv.DictReader(file) if row["optimizer"] == "optax-muon"]
    return {
        f"{r['tree']}, {r['machine']}": r
        for r in rows
        if float(r["products_mcycles"] or 0) and "slices" not in r["machine"]
    }


@pytest.mark.parametrize("case", committed())
def test_a_plan_is_within_15_percent_of_a_compiled_pod(case):
    row = committed()[case]
    chip = row["machine"].split()[0]
    axes, extents = zip(*(axis.split() for axis in row["mesh"].split(" x ")), strict=True)
    mesh = AbstractMesh(tuple(map(int, extents)), axes)
    name, changes = MODELS[row["tree"]]
    model = spec.model(dataclasses.replace(spec.named_configs()[name], **changes))
    with jax.numpy_dtype_promotion("standard"):  # Flax's initializers promote.
        tree = model.abstract_params
        if row["tree"] == "Llama 3 8B":
            tree = abstract.unstacked(tree, "layers")
        params = abstract.on_mesh(tree, mesh)
    found = optax_muon.plan(params, platform=KIND[chip])
    # Of another plan the row would have to be compiled again.
    assert found.cost.collective_bytes / 2**20 == pytest.approx(float(row["planned_mib"]), abs=0.1)
    cycles = 1e6 * (float(row["products_mcycles"]) + float(row["rest_mcycles"]))
    compiled = cycles / CLOCK[chip] + 1e-3 * float(row["exposed_ms"])
    assert found.seconds == pytest.approx(compiled, rel=0.15)


def test_a_plan_says_whose_times_it_has_where_those_of_the_device_are_unknown():
    if "platform" not in inspect.signature(AbstractDevice).parameters:
        pytest.skip("abstract devices of this jax have no platform")
    kernel = {"kernel": jax.ShapeDtypeStruct((8, 4), "float32")}

    def printed(kind):
        device = AbstractDevice(kind, None, "gpu")
        mesh = AbstractMesh((2,), ("fsdp",), abstract_device=device)
        shardings = {"kernel": NamedSharding(mesh, P("fsdp"))}
        return str(optax_muon.plan(kernel, shardings=shardings))

    remark = "no rates of NVIDIA L4 are known: the times are those of NVIDIA H100, and only compare"
    assert remark in printed("NVIDIA L4")
    assert "no rates of" not in printed("NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize("kind", ["Trainium 2", "NVIDIA L4"])
def test_devices_without_rates_are_refused_by_their_platform(kind):
    if "platform" not in inspect.signature(AbstractDevice).parameters:
        pytest.skip("abstract devices of this jax have no platform")
    device = AbstractDevice(kind, None, kind.split()[0].lower())
    mesh = AbstractMesh((2,), ("fsdp",), abstract_device=device)
    kernel = jax.ShapeDtypeStruct((8, 4), "float32")
    shardings = {"kernel": NamedSharding(mesh, P("fsdp"))}
    name = device.platform
    with pytest.raises(ValueError, match=f"platform '{name}' is unknown; use one of tpu, gpu, cpu"):
        optax_muon.plan({"kernel": kernel}, shardings=shardings)
    assert optax_muon.plan({"kernel": kernel}, shardings=shardings, platform="gpu")


def test_an_unknown_device_is_refused_with_all_that_are_known():
    with pytest.raises(ValueError, match="platform 'TPU v9' is unknown") as refused:
        optax_muon.plan({"kernel": jax.ShapeDtypeStruct((8, 4), "float32")}, platform="TPU v9")
    assert all(name in str(refused.value) for name in (*PLATFORMS, *KINDS))
