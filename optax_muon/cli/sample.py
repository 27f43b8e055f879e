"""`optax-muon sample` lets a trained model write; the work is done in `training/generate.py`."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from optax_muon.cli.options import at_least
from optax_muon.errors import UsageError
from optax_muon.training.data.documents import whole_characters
from optax_muon.training.data.tokenizer import Subwords, Tokenizer
from optax_muon.training.generate import generate
from optax_muon.training.initialize import PretrainedSource


class Opening(NamedTuple):
    """What is there before the model writes."""

    tokens: list[int]
    """The tokens that it goes on from."""
    stops: tuple[int, ...]
    """The tokens that end what it writes."""
    shown: str
    """What is printed before that: the prompt, or the user's turn and the assistant's name."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Generate text from a prompt."""

    run: str = "small"
    """Name of a run in --runs, or a run's folder: one of train, finetune or import-hf."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    trial: str | None = None
    """Optimizer whose parameters to use, such as adamw, muon-carried or muon; by default the last
    one of the run that has a checkpoint."""
    prompt: str = "def "
    """Text to continue; if it is empty, a new text begins. Where the run's tokenizer has a chat
    template, it is what the user says, and the assistant answers; both turns are printed."""
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
        """Print the prompt and its continuation, or the two turns of a conversation."""
        at_least(1, "length", self.length)
        at_least(0, "temperature", self.temperature)
        at_least(0, "seed", self.seed)
        if self.prompt != whole_characters(self.prompt):
            raise UsageError(f"--prompt is {self.prompt!r}; it must be text in UTF-8")
        named = self.runs / self.run
        folder = Path(self.run) if Path(self.run).is_dir() and not named.is_dir() else named
        source = PretrainedSource(folder, self.trial)
        source.check()
        tokenizer = source.tokenizer
        opening = self._opening(tokenizer)
        params, bias = source.weights()
        tokens = generate(
            source.model, params, bias, opening.tokens, self.length, self.temperature, self.seed
        )
        written = itertools.takewhile(lambda token: token not in opening.stops, tokens)
        Console().out(opening.shown + tokenizer.decode([*written]), highlight=False)

    def _opening(self, tokenizer: Tokenizer) -> Opening:
        if isinstance(tokenizer, Subwords) and tokenizer.has_chat_template and not self.raw:
            return Opening(
                tokenizer.encode(tokenizer.prompt(self.prompt), special=True),
                (*tokenizer.end, *tokenizer.turn_end),
                f"user: {self.prompt}\nassistant: ",
            )
        tokens = [*tokenizer.begin, *tokenizer.encode(self.prompt)]
        if not tokens:
            raise UsageError("--prompt is empty, and the tokenizer has no token that begins a text")
        return Opening(tokens, tokenizer.end, self.prompt)
