"""The programs of `docs/examples`: each is run as a script, and what it prints is read.

They run with the promotion of dtypes and ranks that their users have, not with the strict one.
"""

import pathlib
import re
import runpy
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLES = {path.stem: path for path in sorted((ROOT / "docs" / "examples").glob("*.py"))}
ROW = re.compile(r"^(\S+)\s+\[.*?\]\s+(.*?)\s+(muon|adamw)\s+\S.*$", re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def compiled_in_haste():
    """Each program runs for a second: most of the time is the compiler's, and it may do less."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as its user does; returns what it printed, and the matrices of `label`."""

    def run(name, steps):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", str(steps)])
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
        printed = capsys.readouterr().out
        return printed, {path: found for path, found, by in ROW.findall(printed) if by == "muon"}

    return run


def final(printed, what="loss"):
    """The number on the last line."""
    return float(re.fullmatch(rf"final {what} (-?[\d.]+)", printed.splitlines()[-1])[1])


def test_every_example_is_short_and_shown():
    page = (ROOT / "docs" / "pages" / "examples.md").read_text()
    shown = re.findall(r'--8<-- "docs/examples/(\w+)\.py"', page)
    assert sorted(shown) == sorted(EXAMPLES)
    assert all(path.read_text().count("\n") < 100 for path in EXAMPLES.values())


@pytest.mark.slow
def test_nnx_on_a_mesh(run):
    printed, muon = run("nnx_mesh", 41)
    assert set(muon.values()) == {"64 x 256", "256 x 64"} and len(muon) == 8
    assert "8 momenta are sharded like their kernels" in printed
    assert "home    8 devices" in printed
    # 1 is the loss of a student that hands on its input; the teacher has loss 0.
    assert final(printed) < 0.4


@pytest.mark.slow
def test_linen_with_scanned_layers_and_logical_axes(run):
    printed, muon = run("linen_scan", 71)
    assert muon == {
        **{f"layers/{name}/kernel": "2 x (64 x 64)" for name in ("query", "key", "value", "out")},
        "layers/up/kernel": "2 x (64 x 256)",
        "layers/down/kernel": "2 x (256 x 64)",
    }
    # Without attention to the first half, log(16) = 2.77 is the least.
    assert final(printed) < 0.5


@pytest.mark.slow
def test_a_vision_transformer(run):
    printed, muon = run("vit_images", 41)
    kernels = {f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert set(muon) == kernels | {"layers/up/kernel", "layers/down/kernel"}
    # The noise leaves every grating plain to see; guessing has log(10) = 2.30.
    assert final(printed) < 0.3


def test_adapters_alone_are_trained(run):
    printed, muon = run("lora_finetune", 61)
    layers = ("up", "down", "out")
    assert set(muon) == {f"{layer}/lora_{factor}" for layer in layers for factor in "ab"}
    assert "the base model stays as it is: True" in printed
    # The task adds variance 1 to the base model, and of that all can be learned.
    assert final(printed) < 0.2


@pytest.mark.slow
def test_equinox_filtered_and_whole(run):
    printed, muon = run("equinox_rnn", 61)
    assert muon == {"cell/weight_ih": "2 x 96", "cell/weight_hh": "32 x 96"}
    assert "filtered and whole give the same model: True" in printed
    # A coin has log(2) = 0.69.
    assert final(printed) < 0.3


@pytest.mark.slow
def test_haiku_with_state(run):
    printed, muon = run("haiku_classifier", 41)
    assert muon == {"conv/w": "27 x 16", "hidden/w": "256 x 64"}
    # Patterns of 192 numbers with noise of twice their size are apart by 7 standard deviations.
    assert final(printed) < 0.5
    assert float(re.search(r"accuracy on fresh images ([\d.]+)", printed)[1]) > 0.9


@pytest.mark.slow
def test_a_policy_learns_to_catch(run):
    printed, muon = run("ppo_catch", 40)
    assert muon == {"params/hidden/kernel": "40 x 64", "params/trunk/kernel": "64 x 64"}
    # At random about -0.5; the best is 1.
    assert final(printed, "mean return") > 0.8


def test_accumulation_clipping_and_an_average_of_the_weights(run):
    printed, muon = run("accumulation_ema", 61)
    assert set(muon) == {"first/kernel", "second/kernel"}
    assert "steps of the optimizer: 61" in printed
    weights, average = map(float, re.search(r"weights ([\d.]+), .* ([\d.]+)\n", printed).groups())
    # The noise of the targets moves the weights about; the average of twenty steps damps that.
    assert average < weights < 0.3


def test_a_stopped_run_resumes_bit_for_bit(run):
    printed, muon = run("orbax_manager", 60)
    assert muon == {"layers/kernel": "4 x (32 x 32)"}
    assert "restored step 20" in printed
    assert "the resumed run is the same, bit for bit: True" in printed
    first = float(re.search(r"step 0: loss ([\d.]+)", printed)[1])
    assert final(printed) < 0.3 * first


def test_a_population_has_its_best_within(run):
    printed, muon = run("population", 60)
    assert set(muon) == {"first/kernel", "second/kernel"}
    losses = [float(x) for x in re.findall(r"learning rate [\d.]+: loss ([\d.]+)", printed)]
    # Too slow at the one end, unstable at the other: each member had its own rate.
    assert min(losses) < 0.2 * min(losses[0], losses[-1])
    assert final(printed) == min(losses)
