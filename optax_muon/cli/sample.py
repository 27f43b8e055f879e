"""`optax-muon sample` lets a trained model write; the work is done in `training/generate.py`."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from rich.console import Console

from optax_muon.cli.options import at_least
from optax_muon.errors import UsageError
from optax_muon.training.data.tokenizer import Subwords, Tokenizer
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
    """Text to continue; if it is empty, a new text begins. Where the run's tokenizer has a chat
    template, it is what the user says, and the assistant answers."""
    raw: bool = False
    """Leave out the chat template of the tokenizer, and continue the prompt itself."""
    length: int = 400
    """Most tokens to generate: bytes, or those of the run's tokenizer. The end of the text, or of
    the assistant's turn, ends it earlier."""
    temperature: float = 0.7
    """Divides the logits; 0 always takes the likeliest token."""
    seed: int = 0
    """Seed of the random draws."""

    def __call__(self) -> None:
        """Print the prompt and its continuation."""
        at_least(1, "length", self.length)
        at_least(0, "temperature", self.temperature)
        at_least(0, "seed", self.seed)
        source = PretrainedSource(self.runs / self.run, self.trial)
        source.check()
        tokenizer = source.tokenizer
        prompt, stops = self._prompt(tokenizer)
        params, bias = source.weights()
        tokens = generate(
            source.model, params, bias, prompt, self.length, self.temperature, self.seed
        )
        written = itertools.takewhile(lambda token: token not in stops, tokens)
        Console().out(self.prompt + tokenizer.decode([*written]), highlight=False)

    def _prompt(self, tokenizer: Tokenizer) -> tuple[list[int], tuple[int, ...]]:
        """The tokens of the prompt, and those that end what is written."""
        if isinstance(tokenizer, Subwords) and tokenizer.has_chat_template and not self.raw:
            conversation = tokenizer.encode(tokenizer.prompt(self.prompt), special=True)
            return conversation, (*tokenizer.end, *tokenizer.turn_end)
        prompt = [*tokenizer.begin, *tokenizer.encode(self.prompt)]
        if not prompt:
            raise UsageError("--prompt is empty, and the tokenizer has no token that begins a text")
        return prompt, tokenizer.end
