"""Pretrain with AdamW and with Muon, fine-tune both with both: the paper's table in toy size.

A Llama (preset `small` of `optax-muon train`) is pretrained on Python's standard library with
either optimizer, Muon at AdamW's learning rate and decay. It is then fine-tuned to complete the
head of a function with the first line of its docstring, on 1000 functions of the same library. That
takes two epochs; the learning rate falls linearly to zero, once from the paper's 5e-5 and once from
7e-4, the same fraction of the pretraining peak as in the paper (5e-5 of 4.2e-4). The loss is that
of the docstrings of 950 other functions, in nats per byte. Pretraining may have seen the files of
these functions, with either optimizer; fine-tuning has seen none of them. There is one seed, so
differences of a hundredth mean nothing. This model has 0.6 million parameters, the paper's 16
billion. The paper's table has four benchmarks, and pretraining and fine-tuning with Muon is the
best on all of them (arXiv 2502.16982, section 3.5).

    python benchmarks/finetune_table.py
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _bench
import _table
import matplotlib.figure
import tyro

from optax_muon.cli.main import main as command
from optax_muon.training.data import prompts
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.finetune import evaluate
from optax_muon.training.initialize import PretrainedSource
from optax_muon.training.optimizers import REGISTRY

PRETRAINED = {"adamw": "adamw", "muon": "muon-carried"}
"""Trials of the pretraining run by optimizer."""
TITLES = {name: REGISTRY[name].title for name in PRETRAINED}
RATES = (5e-5, 7e-4)
BATCH = 16
EVAL_BATCH = 50


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained."""

    preset: str
    context: int
    examples: int


FULL, TOY = Size("small", 128, 1000), Size("tiny", 64, 40)


@dataclasses.dataclass(frozen=True)
class Case:
    """The learning rate at which fine-tuning starts."""

    rate: float

    def __str__(self) -> str:
        return f"lr {self.rate:g}"


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """A model after pretraining and fine-tuning."""

    case: str
    trial: str
    """The optimizers of pretraining and of fine-tuning."""
    before: float
    """Loss before fine-tuning."""
    loss: float
    """Loss after it."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """The folder of all training runs; a script that was stopped continues there."""

    folder: Path
    size: Size

    @property
    def pretraining(self) -> Path:
        """The pretraining run."""
        return self.folder / "pretrained"

    def prepare(self) -> None:
        """Write the examples, and pretrain."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pairs = functions(self.size.context)
        self._write("training", pairs[::2])
        self._write("evaluation", pairs[1::2])
        numbers = ["--optimizers", *PRETRAINED.values()]
        sizes = ["--preset", self.size.preset, "--context", self.size.context]
        self._command(self.pretraining, "train", *sizes, *numbers)

    def finetuned(self, case: Case, before: str, after: str) -> Path:
        """Fine-tune a pretrained model, and return the folder of the run."""
        run = self.folder / f"{before}-{after}-{case.rate:g}"
        source = ["--from", self.pretraining, "--trial", PRETRAINED[before]]
        numbers = ["--optimizers", after, "--lr", case.rate, "--batch", BATCH]
        self._command(run, "finetune", *source, "--data", self._path("training"), *numbers)
        return run

    def loss(self, run: Path, trial: str) -> float:
        """The loss on the functions that were held out of fine-tuning."""
        source = PretrainedSource(run, trial)
        loaded = prompts.load_prompts(self._path("evaluation"), self.size.context).train
        return evaluate(source.model, *source.weights(), loaded, EVAL_BATCH).loss

    def _command(self, run: Path, *words: Any) -> None:
        resume = ["--resume"] if run.exists() else []
        command([*map(str, words), "--runs", str(run.parent), "--name", run.name, *resume])

    def _write(self, name: str, pairs: Sequence[tuple[str, str]]) -> None:
        """Write as many pairs as the size asks for, taken evenly from all of them."""
        count = min(self.size.examples, len(pairs))
        chosen = [pairs[i * len(pairs) // count] for i in range(count)]
        lines = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in chosen)
        self._path(name).write_text("\n".join(lines) + "\n")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


def main(options: _bench.Options) -> None:
    """Train what is not trained yet, and write the results."""
    folder, size = options.out or _bench.HERE.parent / "runs", TOY if options.quick else FULL
    runs = Runs(folder / "finetune_table" / size.preset, size)
    runs.prepare()
    results = dataclasses.replace(options, out=options.out or options.folder / "finetune")
    cases = [Case(rate) for rate in RATES]
    starts = {before: runs.loss(runs.pretraining, trial) for before, trial in PRETRAINED.items()}

    def measure(case: Case) -> Iterator[FinetuneResult]:
        for before, start in starts.items():
            for after in TITLES:
                loss = runs.loss(runs.finetuned(case, before, after), after)
                name = f"{TITLES[before]} / {TITLES[after]}"
                yield FinetuneResult(str(case), name, round(start, 4), round(loss, 4))

    _bench.run(results, "finetune_table", FinetuneResult, cases, measure, page, picture)


def functions(context: int) -> list[tuple[str, str]]:
    """Heads and first lines of docstrings of the standard library that fit, one for each head."""
    corpus = load_corpus(None, context)
    texts = b"".join((corpus.train.tobytes(), corpus.held_out.tobytes())).split(b"\0")
    found = dict(pair for text in sorted(texts) for pair in _documented(text))
    return sorted(
        (prompt, answer)
        for prompt, answer in found.items()
        if 1 + len(prompt.encode()) + len(answer.encode()) <= context
    )


def _documented(text: bytes) -> Iterator[tuple[str, str]]:
    """The functions of a file that have a docstring."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # a template, or another version's syntax
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            first = docstring.splitlines()[0]
            if first:
                yield f'def {node.name}({ast.unparse(node.args)}):\n    """', first


def page(rows: Sequence[FinetuneResult]) -> list[str]:
    """The Markdown page."""
    names = list(dict.fromkeys(row.trial for row in rows))
    cells = {(row.case, row.trial): row for row in rows}
    lines = [
        ("before", *(f"{next(r for r in rows if r.trial == n).before:.4f}" for n in names)),
        *(
            (case, *(f"{cells[case, name].loss:.4f}" for name in names))
            for case in dict.fromkeys(row.case for row in rows)
        ),
    ]
    table = _table.markdown(("pretrained / fine-tuned with", *names), lines)
    title = "Pretraining and fine-tuning, with AdamW and with Muon"
    return [*_bench.page_head(title, __doc__), *table, "", *_gaps(rows)]


def _gaps(rows: Sequence[FinetuneResult]) -> Iterator[str]:
    """Compare fine-tuning with Muon and with AdamW of the same model."""
    losses = {(row.case, row.trial): row.loss for row in rows}
    for case in dict.fromkeys(row.case for row in rows):
        for before in TITLES.values():
            gap = losses[case, f"{before} / Muon"] - losses[case, f"{before} / AdamW"]
            side = "above" if gap > 0 else "below"
            yield (
                f"- {case}, pretrained with {before}: fine-tuning with Muon ends {abs(gap):.3f} "
                f"{side} fine-tuning with AdamW."
            )


def picture(rows: Sequence[FinetuneResult]) -> matplotlib.figure.Figure:
    """The loss before and after fine-tuning, a panel for each learning rate."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = matplotlib.figure.Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        mine = [row for row in rows if row.case == case]
        for place, row in zip(range(len(mine), 0, -1), mine, strict=True):
            axes.plot([row.before, row.loss], [place] * 2, color="#6b7280", linewidth=1, zorder=1)
            axes.plot(row.before, place, "o", color="#6b7280", fillstyle="none")
            axes.plot(row.loss, place, "o", color="#2b8cbe")
            axes.annotate(
                f"{row.loss:.3f}", (row.loss, place), (0, 6), textcoords="offset points", fontsize=8
            )
        axes.set_yticks(range(len(mine), 0, -1), [row.trial for row in mine])
        axes.set_ylim(0.5, len(mine) + 0.6)
        axes.set(title=case, xlabel="loss before (open) and after, nats per byte")
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("pretrained / fine-tuned with", fontsize=9)
    return figure


if __name__ == "__main__":
    main(tyro.cli(_bench.Options))
