"""The text of the experiments: Python sources of published packages, 77 MB, split by package.

`corpus/train.txt` and `corpus/held_out.txt` are requirements with hashes. pip downloads these
wheels once, 23 MB in all, and refuses others. Nothing of a held-out package is trained on. Tokens
are bytes, with a zero byte before each file. Tests are left out: many are tables of numbers.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from optax_muon.training.data.corpus import Corpus

LISTS = Path(__file__).parent / "corpus"
TESTS = frozenset({"test", "tests"})


def load(folder: Path) -> Corpus:
    """The corpus; the first call downloads it to a folder."""
    parts = {name: _part(name, folder) for name in ("train", "held_out")}
    return Corpus(**parts, origin="the Python sources listed in benchmarks/corpus")


def _part(name: str, folder: Path) -> np.ndarray:
    """The bytes of a part, memory-mapped."""
    path = folder / f"{name}.npy"
    if not path.exists():
        wheels = folder / name
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        only_wheels = ["--only-binary", ":all:", "--dest", wheels]
        subprocess.run([*pip, *only_wheels, "--requirement", LISTS / f"{name}.txt"], check=True)
        texts = (text for wheel in sorted(wheels.glob("*.whl")) for text in _sources(wheel))
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.save(file, np.frombuffer(b"".join(b"\0" + text for text in texts), np.uint8))
        unfinished.rename(path)
    return np.load(path, mmap_mode="r")


def _sources(wheel: Path) -> list[bytes]:
    """The sources in a wheel, in the order of their paths."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".py"))
        return [archive.read(n) for n in names if not TESTS & set(PurePosixPath(n).parts)]
