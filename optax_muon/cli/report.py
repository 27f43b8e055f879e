"""`optax-muon report` compares finished runs; the work is done in `reports/runs.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from optax_muon.cli.reports import runs
from optax_muon.cli.reports.tables import terminal_table
from optax_muon.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare runs: their held-out curves on one picture, their final losses in one table.

    Runs that differ in --seed alone are repetitions of one experiment: they become one curve and
    one row, with the mean and its 95% interval by Student's t. The first optimizer of the first run
    is the baseline. Writes report.md, report.png, report.svg and report.csv; nothing is trained.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, made by train or finetune."""
    out: Path = Path("runs/report")
    """Folder of the result; an earlier report in it is replaced."""

    def __call__(self) -> None:
        """Read, write and print."""
        if not self.runs:
            raise UsageError("no run is named; give the folders of some, such as runs/small")
        for path in self.runs:
            if [each.resolve() for each in self.runs].count(path.resolve()) > 1:
                raise UsageError(f"{path} is given twice; give each run once")
        trials = [trial for path in self.runs for trial in runs.read(path)]
        groups = runs.write(trials, self.out)
        console = Console()
        console.print(terminal_table("held-out loss", runs.table(groups)))
        console.print(f"\n{runs.explain(groups)}\n", highlight=False, markup=False)
        console.out(f"Results are in {self.out}", highlight=False)
