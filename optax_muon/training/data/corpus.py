"""Corpora of text as bytes or tokens, split into a training and a held-out part.

The default is the source of Python's own standard library, which every machine has (about 9 MB). A
hash of a file's path inside the corpus decides whether it is held out, so every machine holds out
the same files. Tokens are bytes, with a zero byte, which no text contains, before each file. A
corpus in other tokens is the folder that `optax-muon tokenize` writes (`tokens.py`), or a `.npy`
file of integers (`numpy.save`); both stay on disk.

A batch is a function of `(seed, step)` alone, so every optimizer sees the same data in the same
order, and a run resumes where it stopped without any saved state.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from optax_muon.errors import UsageError

# Tests and installed packages differ between machines; `encodings` and `pydoc_data` are generated
# tables, not written text.
NOT_TEXT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"}
)
HELD_OUT = 1 / 20
FEWEST_FILES = 20
DESCRIPTION, PARTS = "tokens.json", ("train", "held_out")
"""The files of a folder of tokens: its description, and the names of its arrays."""
CHUNK = 2**24
"""Tokens scanned per chunk."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as tokens, in two disjoint parts."""

    train: np.ndarray
    """Integers, `[train tokens]`; uint8 where tokens are bytes."""
    held_out: np.ndarray
    """Integers, `[held-out tokens]`, never trained on."""
    origin: str
    """Where the text is from and how it was split, as reports print it."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that made the tokens, if it is known."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both parts: equal on two machines exactly if their texts are equal."""
        digest = hashlib.sha256()
        for chunk in (*_chunks(self.train), np.frombuffer(b"|", np.uint8), *_chunks(self.held_out)):
            digest.update(np.ascontiguousarray(chunk).data)
        return digest.hexdigest()


def load_corpus(pattern: str | None, context: int, vocab: int = 256) -> Corpus:
    """Read the corpus.

    Args:
        pattern: A file, a folder, or a glob (`**` matches subfolders); or a folder of tokens, or a
            `.npy` file of them. None is the standard library.
        context: Tokens of one sequence; each part must hold at least one, and the token after it.
        vocab: Size of the model's vocabulary.

    Returns:
        The corpus.

    Raises:
        UsageError: When no file matches, there is too little text, or a token is not in the
            vocabulary.

    >>> corpus = load_corpus(None, context=128)
    >>> corpus.train.dtype, len(corpus.train) > 10 * len(corpus.held_out) > 0
    (dtype('uint8'), True)
    """
    if pattern is not None and is_token_folder(pattern):
        corpus = _token_folder(Path(pattern).expanduser())
    elif pattern is not None and pattern.endswith(".npy"):
        corpus = _tokens(Path(pattern).expanduser())
    else:
        root, files = matching_files(pattern)
        texts = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
        train, held_out, how = _split(texts)
        corpus = Corpus(train, held_out, f"{_title(pattern)}: {len(files)} files, {how}")
    for part, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(tokens) <= context:
            unit = "bytes" if tokens.dtype == np.uint8 else "tokens"
            raise UsageError(
                f"the text is too short for one sequence: {len(tokens)} {unit} in the {part} part; "
                f"at least {context + 1} are needed (context {context} + 1)"
            )
        low, high = _range(tokens)
        if low < 0 or high >= vocab:
            wrong = low if low < 0 else high
            raise UsageError(
                f"--data has a token {wrong}; the model's vocabulary is 0 to {vocab - 1}"
            )
    return corpus


def starts(tokens: np.ndarray, seed: int, step: int, size: int, context: int) -> np.ndarray:
    """Random indices of windows' first tokens, int64 `[size]`; a pure function of its arguments."""
    random = np.random.Generator(np.random.Philox(key=[seed, step]))
    return random.integers(0, len(tokens) - context, size)


def held_out_starts(tokens: np.ndarray, size: int, context: int) -> np.ndarray:
    """First tokens of at most `size` evenly spread windows, int64; no two windows overlap."""
    count = min(size, len(tokens) // (context + 1))
    return np.linspace(0, len(tokens) - context - 1, count).astype(np.int64)


def windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    """The windows that begin at `starts`, `[..]`: int32 `[.., context + 1]`.

    >>> windows(np.arange(9, dtype=np.uint8), np.array([0, 5]), context=2).tolist()
    [[0, 1, 2], [5, 6, 7]]
    """
    return tokens[starts[..., None] + np.arange(context + 1)].astype(np.int32)


def matching_files(pattern: str | None) -> tuple[Path, list[Path]]:
    """The files of a file, a folder or a glob, and the folder that they are in.

    Raises:
        UsageError: There is none.
    """
    return _standard_library() if pattern is None else _matches(pattern)


def is_held_out(name: str) -> bool:
    """Whether a file, or a document, is held out: by a hash of its path in the corpus, or text."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def is_token_folder(pattern: str) -> bool:
    """Whether a folder was written by `optax-muon tokenize`."""
    return (Path(pattern).expanduser() / DESCRIPTION).is_file()


def vocabulary(pattern: str | None) -> int | None:
    """Number of tokens of the tokenizer that made a folder of tokens; None of anything else."""
    if pattern is None or not is_token_folder(pattern):
        return None
    size: int = describe_tokens(Path(pattern).expanduser())["vocab_size"]
    return size


def describe_tokens(folder: Path) -> dict[str, Any]:
    """What `tokens.json` says: the files, documents, tokens of both parts, and `vocab_size`.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"cannot read {folder / DESCRIPTION}: {error}") from error
    return description


def how_held_out(few: bool) -> str:
    """How documents are split, as reports print it: the ends of few, or whole ones of many."""
    return f"the last {HELD_OUT:.0%} of each held out" if few else f"{HELD_OUT:.0%} held out"


def _token_folder(folder: Path) -> Corpus:
    """The two arrays of a folder, memory-mapped."""
    said = describe_tokens(folder)
    train, held_out = (_array(folder / f"{part}.npy") for part in PARTS)
    how = f"{said['documents']:,} documents, {len(train):,} tokens and {len(held_out):,} held out"
    return Corpus(train, held_out, f"{folder}: {how}, {said['how']}", folder)


def _tokens(path: Path) -> Corpus:
    """The tokens of a file, memory-mapped."""
    tokens = _array(path)
    cut = round(len(tokens) * (1 - HELD_OUT))
    how = f"{len(tokens):,} tokens, the last {HELD_OUT:.0%} held out"
    return Corpus(tokens[:cut], tokens[cut:], f"{path}: {how}")


def _array(path: Path) -> np.ndarray:
    """Integers of a file, memory-mapped."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UsageError(
            f"{path} is {tokens.dtype} {list(tokens.shape)}; tokens are integers along one axis"
        )
    return tokens


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """All tokens, chunk by chunk: a file may be larger than memory."""
    return (tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK))


def _range(tokens: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest token."""
    ends = [(int(chunk.min()), int(chunk.max())) for chunk in _chunks(tokens)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _split(texts: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray, str]:
    """Hold out whole files, or, of few files, the end of each."""
    names = sorted(texts)
    if len(names) >= FEWEST_FILES:
        train = [texts[name] for name in names if not is_held_out(name)]
        held_out = [texts[name] for name in names if is_held_out(name)]
        return _join(train), _join(held_out), f"{len(held_out)} of them held out"
    cuts = {name: round(len(text) * (1 - HELD_OUT)) for name, text in texts.items()}
    train = [texts[name][: cuts[name]] for name in names]
    held_out = [texts[name][cuts[name] :] for name in names]
    return _join(train), _join(held_out), how_held_out(few=True)


def _join(texts: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(b"\0" + text for text in texts), np.uint8)


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if path.is_file())
    return root, [path for path in files if not NOT_TEXT & set(path.relative_to(root).parts)]


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    pattern = os.path.expanduser(pattern)
    pattern = os.path.join(pattern, "**") if os.path.isdir(pattern) else pattern
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in files if path.is_file()]
    if not files:
        raise UsageError(f"no file matches {pattern!r}; --data takes a file, a folder or a glob")
    return Path(os.path.commonpath([path.parent for path in files])), files


def _title(pattern: str | None) -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    return f"Python {version} standard library" if pattern is None else pattern
