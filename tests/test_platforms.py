"""Facts about the machine: whether its CPU multiplies bfloat16."""

import jax
import jax.numpy as jnp
import pytest

import optax_muon
from optax_muon import platforms
from optax_muon.platforms import bfloat16_instructions, slow_bfloat16


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
