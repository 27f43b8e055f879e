"""`optax-muon sample` lets a trained model write; the work is done in `training/generate.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from optax_muon.cli.options import at_least
from optax_muon.training.generate import generate
from optax_muon.training.initialize import PretrainedSource


@dataclasses.dataclass(frozen=True)
class Sample:
    """Generate text from a prompt."""

    run: str = "small"
    """Name of the run."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    trial: str | None = None
    """Optimizer whose parameters to use, such as adamw, muon-carried or muon; by default the last
    one of the run that has a checkpoint."""
    prompt: str = "def "
    """Text to continue; if it is empty, generation starts at the beginning of a file."""
    length: int = 400
    """Number of bytes to generate."""
    temperature: float = 0.7
    """Divides the logits; 0 always takes the likeliest byte."""
    seed: int = 0
    """Seed of the random draws."""

    def __call__(self) -> None:
        """Print the prompt and its continuation."""
        at_least(1, "length", self.length)
        at_least(0, "temperature", self.temperature)
        at_least(0, "seed", self.seed)
        source = PretrainedSource(self.runs / self.run, self.trial)
        params, bias = source.weights()
        prompt = self.prompt.encode()
        text = generate(
            source.model, params, bias, prompt, self.length, self.temperature, self.seed
        )
        Console().out((prompt + text).decode(errors="replace"), highlight=False)
