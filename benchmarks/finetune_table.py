"""Pretrain with AdamW and with Muon, fine-tune both with both: the paper's table in toy size.

A Llama (preset `small` of `optax-muon train`) is pretrained on Python's standard library with
either optimizer, Muon at AdamW's learning rate and decay. It is then fine-tuned to complete the
head of a function with the first line of its docstring, on 1000 functions of the same library. That
takes two epochs; the learning rate falls linearly to zero. Its start is searched for each of the
four pairs, in factors of two until the best is inside, with seed 0; the best is repeated with three
other seeds, from models that were pretrained with those seeds. The loss is that of the docstrings
of 950 other functions, in nats per byte. Pretraining may have seen the files of these functions,
with either optimizer; fine-tuning has seen none of them. This model has 0.6 million parameters, the
paper's 16 billion. The paper's table has four benchmarks, and pretraining and fine-tuning with Muon
is the best on all of them (arXiv 2502.16982, section 3.5). Differences have their seeds paired, and
a 95% interval by Student's t.

    python benchmarks/finetune_table.py
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _bench
import _table
import matplotlib.figure
import tyro

from optax_muon.cli.main import main as command
from optax_muon.training import styles
from optax_muon.training.data import prompts
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.finetune import evaluate
from optax_muon.training.initialize import PretrainedSource
from optax_muon.training.optimizers import REGISTRY
from optax_muon.training.search import tune
from optax_muon.training.statistics import difference

PRETRAINED = {"adamw": "adamw", "muon": "muon-carried"}
"""Trials of the pretraining run by optimizer."""
PAIRS = tuple(itertools.product(PRETRAINED, PRETRAINED))
"""Optimizers of pretraining and of fine-tuning."""
FIRST_RATE = 1.4e-3
SEEDS = (1, 2, 3)
"""Seeds of the runs that are compared; the search has seed 0."""
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
class FinetuneRun:
    """One model, pretrained and fine-tuned."""

    before: str
    """The optimizer of pretraining."""
    after: str
    """The optimizer of fine-tuning."""
    lr: float
    """Learning rate at which fine-tuning starts."""
    seed: int = 0
    """Seed of pretraining and of fine-tuning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneResult(FinetuneRun):
    """A run and its outcome."""

    start: float
    """Loss before fine-tuning."""
    loss: float
    """Loss after it."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """The folder of all training runs; a script that was stopped continues there."""

    folder: Path
    size: Size

    def prepare(self) -> None:
        """Write the examples."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pairs = functions(self.size.context)
        self._write("training", pairs[::2])
        self._write("evaluation", pairs[1::2])

    def train(self, run: FinetuneRun) -> FinetuneResult:
        """Do a run: pretrain, if that is not done yet, and fine-tune."""
        pretrained = self._pretrained(run.seed)
        folder = self.folder / f"{run.before}-{run.after}-{run.lr:g}-{run.seed}"
        source = ["--from", pretrained, "--trial", PRETRAINED[run.before], "--seed", run.seed]
        numbers = ["--optimizers", run.after, "--lr", run.lr, "--batch", BATCH]
        self._command(folder, "finetune", *source, "--data", self._path("training"), *numbers)
        start = self._loss(pretrained, PRETRAINED[run.before])
        loss = self._loss(folder, run.after)
        return FinetuneResult(**dataclasses.asdict(run), start=round(start, 4), loss=round(loss, 4))

    def _pretrained(self, seed: int) -> Path:
        """The pretraining run of a seed."""
        run = self.folder / f"pretrained-{seed}"
        sizes = ["--preset", self.size.preset, "--context", self.size.context, "--seed", seed]
        self._command(run, "train", *sizes, "--optimizers", *PRETRAINED.values())
        return run

    def _loss(self, run: Path, trial: str) -> float:
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


@dataclasses.dataclass(frozen=True)
class Options(_bench.Options):
    """Options of the experiment."""

    only_report: bool = False
    """Write the report of the finished runs, and train nothing."""


def main(options: Options) -> None:
    """Train what is not trained yet, and write the results."""
    folder, size = options.out or _bench.HERE.parent / "runs", TOY if options.quick else FULL
    results = dataclasses.replace(options, out=options.out or options.folder / "finetune")
    table = results.folder / "finetune_table.csv"
    runs, rows = Runs(folder / "finetune_table" / size.preset, size), read(table)
    if not options.only_report:
        runs.prepare()
        results.folder.mkdir(parents=True, exist_ok=True)
    while not options.only_report and (missing := needed(rows)):
        for run in _bench.each(missing, "finetune_table"):
            rows[run] = runs.train(run)
            _table.write(table, FinetuneResult, rows.values())
    _bench.publish(
        results, "finetune_table", FinetuneResult, [*rows.values()], page(rows), picture(rows)
    )


Rows = dict[FinetuneRun, FinetuneResult]
"""The finished runs."""
Best = dict[tuple[str, str], list[FinetuneResult]]
"""The best runs of each pair of optimizers, one for each seed; pairs that are not finished lack."""


def read(table: Path) -> Rows:
    """The finished runs."""
    names = [field.name for field in dataclasses.fields(FinetuneRun)]
    return {
        FinetuneRun(*(getattr(row, name) for name in names)): row
        for row in _table.read(table, FinetuneResult)
    }


def needed(rows: Rows) -> list[FinetuneRun]:
    """The runs to do next."""
    return [run for pair in PAIRS for run in _tune(rows, pair)[0]]


def best(rows: Rows) -> Best:
    """The runs that are compared."""
    found = {pair: [rows[run] for run in _tune(rows, pair)[1]] for pair in PAIRS}
    return {pair: each for pair, each in found.items() if each}


def _tune(rows: Rows, pair: tuple[str, str]) -> tuple[list[FinetuneRun], list[FinetuneRun]]:
    losses = {run: row.loss for run, row in rows.items()}
    return tune(losses, FinetuneRun(*pair, FIRST_RATE), ["lr"], SEEDS)


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


def page(rows: Rows) -> list[str]:
    """The Markdown page: what is compared, and the search."""
    picked, lines = best(rows), []
    if picked:
        heads = ("pretrained / fine-tuned with", "lr", "before", "after", "range of seeds")
        table = _table.markdown(heads, (_row(pair, found) for pair, found in picked.items()))
        lines = [*table, "", *_gaps(picked), ""]
    if len(picked) < len(PAIRS):
        lines += ["The seeds of some pairs are still to come.", ""]
    rates = sorted({run.lr for run in rows if run.seed == 0})
    cells = (
        (title(pair), *(_loss(rows.get(FinetuneRun(*pair, rate))) for rate in rates))
        for pair in PAIRS
    )
    heads = ("search, seed 0: loss after", *(f"lr {rate:g}" for rate in rates))
    heading = "Pretraining and fine-tuning, with AdamW and with Muon"
    return [*_bench.page_head(heading, __doc__), *lines, *_table.markdown(heads, cells)]


def _loss(row: FinetuneResult | None) -> str:
    return "" if row is None else f"{row.loss:.4f}"


def _row(pair: tuple[str, str], rows: Sequence[FinetuneResult]) -> tuple[object, ...]:
    losses = [row.loss for row in rows]
    return (
        *(title(pair), f"{rows[0].lr:g}"),
        f"{statistics.fmean(row.start for row in rows):.4f}",
        f"{statistics.fmean(losses):.4f}",
        f"{max(losses) - min(losses):.4f}",
    )


def title(pair: tuple[str, str]) -> str:
    """A pair of optimizers in words."""
    return " / ".join(REGISTRY[name].title for name in pair)


def _gaps(picked: Best) -> Iterator[str]:
    """Compare fine-tuning with Muon and with AdamW of the same model."""
    for before in PRETRAINED:
        pairs = [(before, after) for after in ("muon", "adamw")]
        if all(pair in picked for pair in pairs):
            muon, adamw = ([row.loss for row in picked[pair]] for pair in pairs)
            yield (
                f"- Pretrained with {REGISTRY[before].title}: the loss of fine-tuning with Muon "
                f"over that with AdamW is {difference(muon, adamw)}."
            )


def summary(picked: Best) -> str:
    """The outcome in a sentence; empty before there is one."""
    if len(picked) < len(PAIRS):
        return ""
    losses = "; ".join(
        f"{title(pair)} {statistics.fmean(row.loss for row in rows):.4f}"
        for pair, rows in picked.items()
    )
    gaps = " ".join(gap.removeprefix("- ") for gap in _gaps(picked))
    return f"{losses}. {gaps}"


def picture(rows: Rows) -> matplotlib.figure.Figure:
    """The loss after fine-tuning over the rate: lines of the search, dots of the other seeds."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="learning rate at the start", ylabel="loss after, nats per byte"
    )
    for place, pair in enumerate(PAIRS):
        mine = {run: row.loss for run, row in rows.items() if (run.before, run.after) == pair}
        searched = sorted((run.lr, loss) for run, loss in mine.items() if run.seed == 0)
        others = [(run.lr, loss) for run, loss in mine.items() if run.seed]
        style = styles.nth(place)
        if searched:
            axes.plot(*zip(*searched, strict=True), **style.curve(), label=title(pair))
        if others:
            axes.plot(*zip(*others, strict=True), **style.dots)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="pretrained / fine-tuned with")
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
