r"""Prompt-completion pairs: lines of JSON to tokens, and weights that count completions alone.

A line is `{"prompt": "reverse abc =", "completion": " cba"}`. It becomes one sequence of tokens; of
bytes,

    \0 prompt completion \0     weights 0 for \0 and the prompt, 1 for the completion and its end

padded with zeros of weight 0. Pretraining puts the same zero byte between texts (`corpus.py`), so a
model knows where a text begins and learns to mark where a completion ends. Other tokenizers have
other tokens there; those with a chat template write prompt and completion as the turns of a user
and an assistant, and all of the assistant's turn has weight 1. Some of the lines are held out, by a
hash of their prompts: no prompt is in both parts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optax_muon.errors import UsageError
from optax_muon.training.data.corpus import HELD_OUT
from optax_muon.training.data.documents import whole_characters
from optax_muon.training.data.tokenizer import Bytes, Subwords, Tokenizer

KEYS = ("prompt", "completion")


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Prompts and completions as a model takes them."""

    tokens: np.ndarray
    """int32 `[examples, context + 1]`."""
    weights: np.ndarray
    """Weights of the predictions of `tokens[:, 1:]`, float32 `[examples, context]`: 1 for tokens of
    a completion and its end, else 0."""

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights of these rows; -1 is a row of weight 0."""
        is_row = (rows >= 0).astype(np.float32)
        return self.tokens[rows], self.weights[rows] * is_row[:, None]


@dataclasses.dataclass(frozen=True)
class PromptDataset:
    """The pairs of a file, in two parts that share no prompt."""

    train: TokenBatch
    """Pairs to learn."""
    held_out: TokenBatch
    """Pairs never trained on."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens and weights."""
        parts = (self.train, self.held_out)
        arrays = (array for part in parts for array in (part.tokens, part.weights))
        return hashlib.sha256(b"|".join(array.tobytes() for array in arrays)).hexdigest()


def load_prompts(
    path: Path, context: int, tokenizer: Tokenizer | None = None, *, raw: bool = False
) -> PromptDataset:
    """Read a file of prompt-completion pairs.

    Args:
        path: A line of JSON per example, UTF-8; empty lines are skipped.
        context: Tokens of one sequence; all but the last token must fit.
        tokenizer: Makes the tokens; None is bytes.
        raw: Whether to leave out the tokenizer's chat template.

    Raises:
        UsageError: When the file cannot be read or has fewer than two prompts; or when a line is
            not JSON, lacks a key, has an empty completion or is too long. The message gives its
            number. Or when the chat template cannot be applied.
    """
    pairs = [_pair(path, number, line) for number, line in _lines(path)]
    encode = functools.partial(_encode, tokenizer or Bytes(), raw)
    sequences = [
        _sequence(path, number, context, *encode(prompt, completion))
        for number, prompt, completion in pairs
    ]
    held_out = _held_out([prompt for _, prompt, _ in pairs])
    if all(held_out):
        raise UsageError(
            f"{path} has {len(set(p for _, p, _ in pairs))} prompts; at least two are needed"
        )
    return PromptDataset(
        _stacked([s for s, out in zip(sequences, held_out, strict=True) if not out]),
        _stacked([s for s, out in zip(sequences, held_out, strict=True) if out]),
    )


def steps(examples: int, batch: int, epochs: int) -> int:
    """Batches in which every example is seen `epochs` times.

    >>> steps(examples=10, batch=4, epochs=2)
    5
    """
    return -(-examples * epochs // batch)


def rows(examples: int, seed: int, step: int, batch: int, epochs: int) -> np.ndarray:
    """The examples of a step, counted from 1: int64 `[batch]`, a pure function of its arguments.

    Every epoch has its own order, and a batch may extend into the next one. The last batch is
    padded with -1.

    >>> [rows(examples=3, seed=0, step=step, batch=2, epochs=1).tolist() for step in (1, 2)]
    [[1, 2], [0, -1]]
    """
    places = np.arange((step - 1) * batch, step * batch)
    orders = {
        epoch: np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples)
        for epoch in set((places // examples).tolist())
        if epoch < epochs
    }
    return np.array(
        [
            orders[epoch][place] if epoch in orders else -1
            for epoch, place in zip(*map(np.ndarray.tolist, divmod(places, examples)), strict=True)
        ]
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers, counted from 1."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {path} cannot be read: {error}") from error
    numbered = enumerate(text.split("\n"), 1)  # splitlines would cut at U+2028 inside a string
    return [(number, line) for number, line in numbered if line.strip()]


def _pair(path: Path, number: int, line: str) -> tuple[int, str, str]:
    """Number, prompt and completion of a line."""
    where = f"{path}, line {number}"
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    for key in KEYS:
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise UsageError(
                f'{where} has no text "{key}"; a line is {{"prompt": "...", "completion": "..."}}'
            )
    if not row["completion"]:
        raise UsageError(f"{where} has an empty completion")
    prompt, completion = (whole_characters(row[key]) for key in KEYS)
    return number, prompt, completion


def _encode(
    tokenizer: Tokenizer, raw: bool, prompt: str, completion: str
) -> tuple[list[int], list[int]]:
    """The tokens of a pair: what stands before the completion, and the rest."""
    if isinstance(tokenizer, Subwords) and tokenizer.has_chat_template and not raw:
        before, turn = tokenizer.conversation(prompt, completion)
        return tokenizer.encode(before, special=True), tokenizer.encode(turn, special=True)
    start = [*tokenizer.begin, *tokenizer.encode(prompt)]
    return start, [*tokenizer.encode(completion), *tokenizer.end]


def _sequence(
    path: Path, number: int, context: int, before: Sequence[int], completion: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[context + 1]` and weights `[context]` of a line."""
    text = [*before, *completion]
    used = len(text) - 1  # the last token is only predicted
    if used > context:
        raise UsageError(
            f"{path}, line {number} is too long: {used} tokens ({len(before)} of the prompt + "
            f"{len(completion) - 1} of the completion); the model's context is {context}"
        )
    tokens = np.zeros([context + 1], np.int32)
    tokens[: len(text)] = text
    weights = np.zeros([context], np.float32)
    weights[len(before) - 1 : used] = 1  # a token is predicted one place before it
    return tokens, weights


def _held_out(prompts: Sequence[str]) -> list[bool]:
    """The twentieth with the smallest hashes, at least one; equal prompts are in the same part."""
    hashes = [hashlib.sha256(prompt.encode()).digest() for prompt in prompts]
    last = sorted(hashes)[: max(1, round(HELD_OUT * len(hashes)))][-1:]
    return [each <= last[0] for each in hashes]


def _stacked(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenBatch:
    tokens, weights = zip(*sequences, strict=True)
    return TokenBatch(np.stack(tokens), np.stack(weights))
