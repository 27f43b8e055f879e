"""Write `benchmarks/README.md`: claim by claim, what others say and what is measured here.

What is measured is read from the committed results, so the page cannot drift from them. Neither can
the evidence in the README, which is written by the same command.

    python benchmarks/page.py
"""

from __future__ import annotations

import csv
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from types import ModuleType

import _bench
import _experiment
import _table
import compute_optimal
import finetune_table
import lr_transfer
import moonlight_ladder
import scaling_law
import tyro
import update_rms
import variants
import weight_decay

PAGE = _bench.HERE / "README.md"
README = _bench.HERE.parent / "README.md"
BEGIN, END = "<!-- evidence, written by benchmarks/page.py -->", "<!-- end of evidence -->"
"""The lines around what is written into the README."""
RESULTS = _bench.HERE / "results"
TO_COME = "still to come"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A row of the page."""

    claim: str
    """What is claimed of Muon."""
    paper: str
    """What arXiv 2502.16982 has."""
    others: str
    """What others found, with the source."""
    measured: str
    """What is measured here."""
    source: str
    """The page of the result, from `results`."""
    command: str
    """What makes it."""

    def cells(self) -> tuple[str, ...]:
        """The row."""
        link = f"[{self.source.rpartition('/')[2]}](results/{self.source})"
        measured = f"{self.measured} ({link})" if self.measured else TO_COME
        return self.claim, self.paper, self.others, measured, f"`{self.command}`"


LADDER_OF_60 = ("--tokens-per-parameter", "60", "--sizes", "3")
"""Arguments of the scaling law with three times the tokens."""
EXPERIMENTS: Sequence[tuple[ModuleType, Sequence[str], str, str, str]] = (
    (
        scaling_law,
        (),
        "Muon needs a fraction of AdamW's FLOPs for the same loss",
        "0.52, 399M to 1.5B parameters (Fig. 1a, Table 3)",
        "0.71 at 0.13B, 0.91 at 1.2B (arXiv 2509.02046); 0.7 up to 1.4B where rate and decay scale "
        "with width (2512.05620); 0.85 to 0.9 of the tokens (2505.02222)",
    ),
    (
        scaling_law,
        LADDER_OF_60,
        "The gain stays in longer runs",
        "-",
        "-",
    ),
    (
        moonlight_ladder,
        (),
        "The gain is smaller for mixtures of experts",
        "2.24B of 15.29B parameters activated, at 1.2T tokens: MMLU 60.4 against AdamW's 60.2, "
        "HumanEval 37.2 against 29.3 (section 3.3)",
        "5 to 20 % where dense models gain 50 % (KellerJordan/Muon issue 19); 0.75 to 0.84 of the "
        "FLOPs, weights of fixed norm (marin issue 5596)",
    ),
    (
        compute_optimal,
        (),
        "The best size, tokens, rate and batch are power laws of the budget",
        "N C^0.511, D C^0.489, lr C^-0.057, B C^0.414 (Table 9)",
        "N C^0.49, D C^0.51 (arXiv 2203.15556, approach 2); N C^0.524, D C^0.476, lr C^-0.125, "
        "B C^0.327 (2401.02954)",
    ),
    (
        lr_transfer,
        (),
        "One learning rate fits all shapes when the update has AdamW's RMS",
        "Eq. 4 as good as Eq. 6, both 0.023 better than Eq. 5 (Table 1)",
        "carried rates can be behind AdamW in short runs (Moonlight issue 36)",
    ),
    (
        update_rms,
        (),
        "An update of RMS 0.2 to 0.4 is best",
        "0.2: 3.325, 0.4: 3.314, 0.05: 3.503, 0.8: 3.543, AdamW: 3.679 (Table 8)",
        "-",
    ),
    (
        weight_decay,
        (),
        "Muon needs weight decay in long runs",
        "without decay ahead early, 0.017 behind in the end (Fig. 2)",
        "a tuned decay is worth as much as most variants (modded-nanogpt, track 3)",
    ),
    (
        variants,
        (),
        "Variants that are said to beat Muon",
        "-",
        "NorMuon and Polar Express tie with a tuned Muon (modded-nanogpt, track 3; nanochat); "
        "momenta of several time scales gain 1 to 6 % of the steps",
    ),
)
"""Experiments and their arguments, with the claim, the paper's numbers and those of others."""


def claims() -> Iterator[Claim]:
    """The rows."""
    for script, arguments, claim, paper, others in EXPERIMENTS:
        options = tyro.cli(script.Options, args=arguments)
        experiment = script.experiment(options)
        name = experiment.name
        summary = experiment.summary(_experiment.load(options, experiment))
        page = f"{name}/{name}.md"
        command = " ".join(("python", f"benchmarks/{script.__name__}.py", *arguments))
        yield Claim(claim, paper, others, summary, page, command)
    yield Claim(
        "Muon's weights have a higher SVD entropy",
        "in over 90 % of the matrices (Fig. 4)",
        "-",
        _spectra(),
        "spectra/spectra.md",
        "optax-muon spectra",
    )
    yield Claim(
        "Pretraining and fine-tuning should use the same optimizer",
        "Muon twice is the best of four on all benchmarks (Table 6); no gain over AdamW on a model "
        "that AdamW pretrained (Table 7)",
        "-",
        _finetune(),
        "finetune/finetune_table.md",
        "python benchmarks/finetune_table.py",
    )


def _spectra() -> str:
    with (RESULTS / "spectra" / "spectra.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["trial"] == "muon-carried"]
    higher, every = (sum(int(row[name]) for row in rows) for name in ("higher", "matrices"))
    return f"{higher / every:.1%} of {every} matrices of a Moonlight of 1.3M parameters, one seed"


def _finetune() -> str:
    rows = finetune_table.read(RESULTS / "finetune" / "finetune_table.csv")
    return finetune_table.summary(finetune_table.best(rows))


OTHER = {
    "update_speed.md": "one update of whole models, beside optax.contrib.muon and torch",
    "share_of_step.md": "whole training steps beside optax.contrib.muon",
    "orthogonalize_speed.md": "Newton-Schulz by form, dtype and shape",
    "compile_time.md": "tracing and compilation",
    "flops_and_bytes.md": "operations, bytes and collectives on a mesh",
    "tpu_ahead_of_time.md": "the same for TPU pods, compiled ahead of time",
    "tpu_cycles.md": "cycles of TPU programs, by the compiler's model",
    "moonlight_step.md": "a training step of Moonlight 16B on a pod, by the compiler's model",
    "train/summary.md": "what `make train` shows",
    "moonlight/summary.md": "the same for a small mixture of experts",
}
"""Results that are about speed and size, or demonstrations."""


def text() -> str:
    """The page."""
    heads = ("claim", "paper", "others", "measured here", "command")
    rows = [claim.cells() for claim in claims()]
    lines = [
        "# What is claimed, and what is measured",
        "",
        "Evidence for the optimizer, from small models on two CPU cores: Llamas of 0.01 to 0.2M "
        "parameters, and mixtures of experts as small, that learn Python sources byte by byte. "
        "Ratios and exponents have the range that holds 90 %, differences a "
        "95% interval by Student's t. Such models say whether the implementation does what the "
        "paper describes; they do not say what happens at billions of parameters. What is measured "
        "here is read from the files in `results` by `python benchmarks/page.py`, which writes "
        "this page.",
        "",
        *_left_aligned(_table.markdown(heads, rows)),
        "",
        "## Speed, memory, communication",
        "",
        *(f"- [{about}](results/{name})" for name, about in OTHER.items()),
        "",
        "Every script takes `--help`, and `--quick` for a check in toy sizes. Experiments are "
        "resumed by the same command.",
    ]
    return "\n".join(lines) + "\n"


def with_evidence(readme: str) -> str:
    """The README with the scaling law's outcome between `BEGIN` and `END`."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    options = scaling_law.Options()
    name = f"benchmarks/results/{options.name}/{options.name}"
    words, *table = scaling_law.headline(options)
    after_table = (
        f"The paper has 0.52 at 399M to 1.5B parameters. [Every run and its numbers]({name}.md), "
        "and [all claims, one by one](benchmarks/README.md)."
    )
    alt = "Held-out loss over FLOPs, AdamW above Muon at AdamW's rate above Muon at its own"
    lines = [
        *(BEGIN, "", f"![{alt}]({name}.png)", "", textwrap.fill(words, 120)),
        *(*table, "", textwrap.fill(after_table, 120), "", END),
    ]
    return before + "\n".join(lines) + after


def _left_aligned(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace("---:", "---"), *lines[2:]]


if __name__ == "__main__":
    PAGE.write_text(text())
    README.write_text(with_evidence(README.read_text()))
