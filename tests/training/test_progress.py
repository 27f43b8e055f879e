"""Progress on a terminal and without one, and the utilization of the devices that it shows."""

import io
import itertools
import re

import jax
import pytest
from rich.console import Console

from optax_muon.cli.main import main
from optax_muon.cli.progress import tracked, with_lines
from optax_muon.platforms import KINDS, peak_flops
from optax_muon.training import flops
from optax_muon.training.config import TrainConfig
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.loop import StepMetrics
from optax_muon.training.presets import PRESETS
from optax_muon.training.progress import Bars, Lines, Progress

pytestmark = pytest.mark.usefixtures("standard_promotion")

TINY = PRESETS["tiny"]
CONFIG = TrainConfig(TINY.model, 8, 100, seed=0, eval_every=20, eval_sequences=1)
TOKENS = 8 * TINY.model.context


class Clock:
    """A clock that stands still until it is set."""

    now = 100.0

    def __call__(self):
        return self.now


def metrics(step, seconds=1.0, val_loss=None):
    return StepMetrics(step, 2.5, 1.0, 0.1, seconds, val_loss)


@pytest.fixture
def lines():
    """Lines on a file, the clock that they read, and what they have written."""
    file, clock = io.StringIO(), Clock()
    shown = Lines(CONFIG, SINGLE_DEVICE, Console(file=file), clock)
    return shown, clock, lambda: file.getvalue().splitlines()


def test_a_line_is_written_every_few_seconds(lines):
    shown, clock, written = lines
    shown.begin("Muon", done=0)
    for step in range(1, 101):
        clock.now += 1.0
        shown.step("Muon", metrics(step))
    assert written()[0] == "Muon: 0/100 steps, the next one is compiled first"
    assert written()[1] == "Muon: 1/100 steps, loss 2.500, val -, 1.0 s with the compilation"
    steps = [int(re.match(r"Muon: (\d+)/100", line)[1]) for line in written()[2:]]
    assert steps == [*range(6, 100, 5), 100]


def test_a_line_says_the_speed_since_the_last_one_and_the_time_left(lines):
    shown, clock, written = lines
    shown.begin("Muon", done=40)
    clock.now += 60.0
    shown.step("Muon", metrics(41, seconds=60.0))
    for step in range(42, 47):
        clock.now += 2.0
        shown.step("Muon", metrics(step, seconds=0.5, val_loss=1.25 if step == 43 else None))
    # At 44 six seconds are gone: three steps of 0.5 s and the rest evaluation; 2 s for each.
    assert written()[-1] == (
        f"Muon: 44/100 steps, loss 2.500, val 1.250, {TOKENS / 0.5:,.0f} tokens/s, "
        "MFU unknown, 0:01:52 left"
    )


def test_the_first_and_the_last_step_are_always_written(lines):
    shown, _, written = lines
    shown.begin("Muon", done=98)
    shown.step("Muon", metrics(99))
    shown.step("Muon", metrics(100, val_loss=2.0))
    assert [line.split(" steps")[0] for line in written()] == [
        "Muon: 98/100",
        "Muon: 99/100",
        "Muon: 100/100",
    ]
    assert written()[-1].endswith("0:00:00 left")


def test_a_trial_that_is_done_is_not_compiled(lines):
    shown, _, written = lines
    shown.begin("Muon", done=100)
    assert written() == ["Muon: 100/100 steps, done before"]


def test_each_trial_has_its_own_clock_and_losses(lines):
    shown, clock, written = lines
    for title in ("AdamW", "Muon"):
        shown.begin(title, done=0)
        shown.step(title, metrics(1))
        clock.now += 10.0
        shown.step(title, metrics(2, val_loss=3.0))
    assert [line for line in written() if "val -" in line] == [
        f"{title}: 1/100 steps, loss 2.500, val -, 1.0 s with the compilation"
        for title in ("AdamW", "Muon")
    ]


def test_bars_are_shown_on_a_terminal_only(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(Progress(["Muon"], CONFIG).display, Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(Progress(["Muon"], CONFIG).display, Lines)
    monkeypatch.delenv("FORCE_COLOR")
    assert isinstance(Progress(["Muon"], CONFIG).display, Lines)


def test_a_hidden_progress_writes_nothing(capsys):
    with Progress(["Muon"], CONFIG, hidden=True) as shown:
        shown.begin("Muon", done=0)
        shown.step("Muon", metrics(1))
    assert capsys.readouterr() == ("", "")


def test_bars_say_what_lines_say():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200)
    shown = Bars(["Muon"], CONFIG, SINGLE_DEVICE, console)
    shown.start()
    shown.begin("Muon", done=3)
    shown.step("Muon", metrics(4, seconds=0.5, val_loss=1.25))
    shown.stop()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).splitlines()[-1]
    for part in ("4/100", "loss 2.500", "val 1.250", f"{TOKENS / 0.5:,.0f} tokens/s", "MFU"):
        assert part in last


@pytest.mark.slow
def test_the_command_writes_lines_where_there_is_no_terminal(text, tmp_path, capsys):
    where = ["--data", text, "--runs", str(tmp_path), "--eval-every", "4", "--save-every", "4"]
    main(["train", "--model", "tiny", "--optimizers", "muon", "--steps", "4", *where])
    shown = capsys.readouterr().err.splitlines()
    assert any(line.startswith("Muon: 1/4 steps, loss") for line in shown)
    last = [line for line in shown if line.startswith("Muon: ")][-1]
    assert re.match(r"Muon: 4/4 steps, loss .* tokens/s, MFU unknown, 0:00:00 left", last)


# ---- lists ---------------------------------------------------------------------------------------


def test_a_list_has_a_line_every_few_seconds():
    file, ticks = io.StringIO(), itertools.count(step=1.0)
    items = with_lines(range(20), "tensors", Console(file=file), lambda: next(ticks))
    assert list(items) == list(range(20))
    assert file.getvalue().splitlines() == [f"{n}/20 tensors" for n in (5, 10, 15, 20)]


@pytest.mark.parametrize("items", [[], [1, 2, 3]])
def test_a_list_comes_back_as_it_is(items, capsys):
    assert list(tracked(iter(items), "things")) == items
    assert capsys.readouterr().err == "", "too short for a line"


# ---- utilization ---------------------------------------------------------------------------------


def test_utilization_is_the_models_operations_over_the_peak(monkeypatch):
    monkeypatch.setattr(flops, "peak_flops", lambda kind: 1e12)
    model = TINY.model
    width, shared = model.hidden_size, model.num_key_value_heads / model.num_attention_heads
    # Queries and output, keys and values, the MLP, two norms; the last norm and the head.
    layer = width * (2 * width + 2 * width * shared + 3 * model.intermediate_size + 2)
    kernels = model.num_hidden_layers * layer + width + width * 256
    attention = model.num_hidden_layers * 2 * model.hidden_size * model.context
    expected = 1000.0 * 6 * (kernels + attention) / 1e12
    assert flops.utilization(CONFIG, 1000.0, SINGLE_DEVICE) == pytest.approx(expected)
    eight = Devices(jax.make_mesh((8,), ("data",)))
    assert flops.utilization(CONFIG, 1000.0, eight) == pytest.approx(expected / 8)


def test_the_peak_of_a_cpu_is_unknown():
    assert flops.utilization(CONFIG, 1000.0, SINGLE_DEVICE) is None


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_the_peak_is_that_of_the_longest_name_that_fits(kind, peak):
    assert peak_flops(kind) == peak
    assert all(peak_flops(name) == row.peak_flops for name, row in KINDS.items())
