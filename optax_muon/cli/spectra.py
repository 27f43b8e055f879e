"""`optax-muon spectra`: how evenly a run's matrices spread their energy, as a table and pictures.

The work is done in `training/spectra.py`, the pictures are drawn by `reports/spectra.py`.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from optax_muon.cli.progress import tracked
from optax_muon.cli.reports import pictures
from optax_muon.cli.reports import spectra as figures
from optax_muon.cli.reports.tables import terminal_table
from optax_muon.training.spectra import SpectraRow, SpectraTrial, rows, sources, spectra


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Compare the singular values of a run's matrices, over all the checkpoints it has kept.

    Writes spectra.csv, the SVD entropies by group and step; spectra.png, their curves; and
    singular_values.png, the singular values of the first and last checkpoint. Prints how many
    matrices have a higher entropy than with the run's first optimizer at the same step.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run; one made by import-hf has a single checkpoint."""
    out: Path | None = None
    """Folder of the result; the run's own by default."""

    def __call__(self) -> None:
        """Decompose, then write, draw and print."""
        trials, kept = sources(self.run)
        shown = tracked(kept, "checkpoints")
        found = [
            spectrum
            for source in shown
            for spectrum in spectra(source.read(), source.trial, source.step)
        ]
        lines = rows(trials, found)
        out = self.out or self.run
        out.mkdir(parents=True, exist_ok=True)
        write(out / "spectra.csv", lines)
        pictures.save(figures.entropies(trials, lines), out / "spectra.png")
        pictures.save(figures.singular_values(trials, found), out / "singular_values.png")
        console = Console()
        console.print(table(trials, lines))
        for line in comparison(trials, lines):
            console.print(line, highlight=False, markup=False)
        console.out(f"Results are in {out}", highlight=False)


def write(path: Path, lines: Sequence[SpectraRow]) -> None:
    """Save the lines as CSV, numbers to six digits; None becomes an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(SpectraRow)])
        writer.writeheader()
        for line in lines:
            cells = dataclasses.asdict(line).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cells})


def table(trials: Sequence[SpectraTrial], lines: Sequence[SpectraRow]) -> Table:
    """Mean entropies by group at the last step, and how many matrices are above the baseline's."""
    step = _last_common(lines)
    last = {(line.group, line.trial): line for line in lines if line.step == step}
    present = {line.trial for line in last.values()}
    shown = [trial for trial in trials if trial.name in present]
    cells = [["group", "matrices", *(trial.title for trial in shown)]]
    for group in dict.fromkeys(group for group, _ in last):
        found = [last[group, trial.name] for trial in shown]
        cells.append([group, str(found[0].matrices), *map(_cell, found)])
    return terminal_table(f"SVD entropy after step {step}", cells)


def comparison(trials: Sequence[SpectraTrial], lines: Sequence[SpectraRow]) -> Iterator[str]:
    """A sentence for every trial that can be compared with the baseline, the first one."""
    for trial in trials:
        compared = [r for r in lines if r.trial == trial.name and r.higher is not None]
        if compared:
            above = sum(line.higher or 0 for line in compared)
            matrices = sum(line.matrices for line in compared)
            steps = len({line.step for line in compared})
            yield (
                f"{trial.title}: {above} of {matrices} matrices ({above / matrices:.1%}) have a "
                f"higher SVD entropy than with {trials[0].title} at the same step, in {steps} "
                f"{'checkpoint' if steps == 1 else 'checkpoints'}. The paper, Muon against AdamW: "
                "over 90%."
            )


def _last_common(lines: Sequence[SpectraRow]) -> int:
    """The last step that every trial has kept, or the last one at all."""
    steps: dict[str, set[int]] = {}
    for line in lines:
        steps.setdefault(line.trial, set()).add(line.step)
    return max(set.intersection(*steps.values()) or set.union(*steps.values()))


def _cell(line: SpectraRow) -> str:
    above = "" if line.higher is None else f" ({line.higher} higher)"
    return f"{line.entropy:.4f}{above}"
