"""Facts about machines: what their vendors publish, and whether a CPU multiplies bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import optax_muon
from optax_muon import hlo, platforms
from optax_muon.platforms import (
    KINDS,
    PLATFORMS,
    bfloat16_instructions,
    get_device,
    is_known,
    slow_bfloat16,
)
from optax_muon.sharding.cost import CostModel, Received

ROWS = {**KINDS, "tpu": PLATFORMS["tpu"], "gpu": PLATFORMS["gpu"]}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_no_device_is_planned_above_what_its_vendor_publishes(kind, dtype):
    sheet, model = ROWS[kind].data_sheet, CostModel.for_platform(kind, dtype)
    assert sheet.source
    assert model.flops <= sheet.flops["float32" if dtype == "float32" else "bfloat16"]
    assert model.memory <= sheet.memory
    assert model.bandwidth <= sheet.links


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_of_a_platforms_devices_the_one_with_the_higher_peak_has_the_higher_rate(platform):
    rows = [row for row in KINDS.values() if row.name == platform]
    found = sorted((row.peak_flops, row.rates_for("bfloat16").flops) for row in rows)
    assert [rate for _, rate in found] == sorted(rate for _, rate in found)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_a_device_hides_is_named_as_hlo_names_it(row):
    assert row.hides <= set(Received().by_collective) <= set(hlo.KINDS)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Received)])
def test_a_message_is_hidden_by_its_own_collective(name):
    kind, received = name.replace("_", "-"), Received(**{name: 5})
    assert received.by_collective[kind] == received.total == 5
    assert received.only({kind}) == received
    assert received.only(set(hlo.KINDS) - {kind}) == Received()


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("TPU v5", "TPU v5p"),
        ("TPU v4 lite", None),
        ("TPU v9", None),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 PCIe"),
        ("NVIDIA A100X", None),
        ("NVIDIA L4", None),
    ],
)
def test_a_kind_has_its_own_row_or_none(kind, row):
    assert is_known(kind) == (row is not None)
    if row:
        assert get_device(kind).kind == row
    else:
        with pytest.raises(ValueError, match="is unknown; use one of tpu, gpu, cpu"):
            get_device(kind)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu sse2 avx2 fma avx512f", False),
        ("flags\t\t: fpu sse2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
        ("processor\t: 0", None),
    ],
)
def test_linux_lists_the_instructions(tmp_path, line, found):
    (info := tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert bfloat16_instructions(info) is found


def test_what_cannot_be_read_is_not_known(tmp_path):
    assert bfloat16_instructions(tmp_path / "absent") is None


@pytest.mark.parametrize(("known", "remarks"), [(False, True), (True, False), (None, False)])
def test_a_plan_says_where_bfloat16_is_slow(monkeypatch, known, remarks):
    monkeypatch.setattr(platforms, "bfloat16_instructions", lambda: known)
    short = optax_muon.NewtonSchulz(dtype=jnp.bfloat16)
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 128), jnp.float32)}}
    printed = str(optax_muon.plan(params, orthogonalizer=short, platform="cpu"))
    assert (platforms.SLOW_BFLOAT16 in printed) == remarks
    assert not slow_bfloat16("tpu", "bfloat16")
    assert not slow_bfloat16("cpu", "float32")
