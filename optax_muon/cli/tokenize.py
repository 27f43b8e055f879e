"""`optax-muon tokenize` makes tokens of text; the work is done in `training/data/tokens.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import tyro
from rich.console import Console

from optax_muon.cli.options import at_least
from optax_muon.cli.progress import show_progress
from optax_muon.errors import UsageError
from optax_muon.training.data import corpus, tokenizer
from optax_muon.training.data.tokenizer import MIN_VOCAB, Subwords
from optax_muon.training.data.tokens import Encoded, TokenizeJob


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Make tokens of text, once, for train --data.

    Reads text files, a document each; .jsonl, a document per line; and .parquet, a document per
    row, with the extra parquet. A twentieth is held out: whole documents, or the end of each where
    there are fewer than twenty. Writes train.npy, held_out.npy, tokens.json and the tokenizer.
    Stopped, even by kill -9, the same command goes on where it was.
    """

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders or quoted globs; Python's own standard library by default."""
    out: Path = Path("tokens")
    """Folder to make; give it to train --data."""
    tokenizer: Path | None = None
    """Tokenizer to use: a tokenizer.json, or the folder of a Hugging Face checkpoint or a run."""
    train_vocab: int | None = None
    """Train a tokenizer on the text instead, by byte-pair encoding, with so many tokens: 257 or
    more."""
    field: str = "text"
    """Key of a line of JSON, or column of parquet, that holds the text."""

    def __call__(self) -> None:
        """Encode, then say what there is."""
        at_least(MIN_VOCAB, "train_vocab", self.train_vocab)
        if (self.tokenizer is None) == (self.train_vocab is None):
            raise UsageError("give either --tokenizer, to use one, or --train-vocab, to train one")
        tokenizer.check_installed()
        patterns = self.inputs or (None,)
        files = [path for pattern in patterns for path in sorted(corpus.matching_files(pattern)[1])]
        job = TokenizeJob(files, self.field, self.out, self._description, self._make)
        show_progress(job.run(), _line, _done)
        read = corpus.load_corpus(str(self.out), 0, corpus.vocabulary(str(self.out)) or 0)
        console = Console(stderr=True)
        console.out(read.origin, highlight=False)
        console.out(f"train on it: optax-muon train --data {self.out}", highlight=False)

    @property
    def _description(self) -> str:
        return str(self.tokenizer or f"trained here, {self.train_vocab} tokens")

    def _make(self, texts: Iterator[str]) -> Subwords:
        if self.tokenizer is not None:
            inside = self.tokenizer / "tokenizer"
            return tokenizer.load(inside if tokenizer.is_in(inside) else self.tokenizer)
        assert self.train_vocab is not None
        Console(stderr=True).out("training the tokenizer", highlight=False)
        return tokenizer.train(texts, self.train_vocab)


def _done(encoded: Encoded) -> float:
    return encoded.done


def _line(encoded: Encoded) -> str:
    return f"{encoded.done:.1%} read, {encoded.documents:,} documents, {encoded.tokens:,} tokens"
