"""`optax-muon doctor` looks at the machine; the checks are those of `diagnosis.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from optax_muon.cli import device_probe, diagnosis
from optax_muon.cli.device_probe import DeviceReport
from optax_muon.cli.diagnosis import Finding
from optax_muon.errors import Unhealthy


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check versions, devices, compiler options and the environment of this machine.

    Starts the devices in another process and computes one update on them. A line that begins with
    an exclamation mark reports a problem, and the line below it is the command that fixes it. The
    exit code is 1 if there is a problem.
    """

    timeout: int = 120
    """Seconds to wait for the devices; a TPU that another process holds never starts."""

    def __call__(self) -> None:
        """Print the findings.

        Raises:
            Unhealthy: Something is wrong.
        """
        found = list(self._findings())
        console = Console(soft_wrap=True)
        for line in lines(found):
            console.out(line, highlight=False)
        if wrong := sum(finding.is_wrong for finding in found):
            checks = "1 check fails" if wrong == 1 else f"{wrong} checks fail"
            raise Unhealthy(f"{checks}; each is followed by the command that fixes it")

    def _findings(self) -> Iterator[Finding]:
        yield Finding("Python", platform.python_version())
        yield from diagnosis.packages()
        report, error = start_devices(self.timeout)
        running = None if report is None else report.platform
        yield from diagnosis.accelerator_packages(running)
        yield from diagnosis.devices(report, error, os.environ)
        yield diagnosis.bfloat16()
        if report is not None:
            yield from diagnosis.options(report, os.environ)
        yield from diagnosis.clusters(os.environ)
        yield diagnosis.disk(Path.cwd())


def start_devices(timeout: float) -> tuple[DeviceReport | None, str]:
    """Start the devices in another process; returns what it found, or how it failed."""
    command = [sys.executable, "-m", device_probe.__name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return None, f"nothing after {timeout:g} seconds"
    if done.returncode:
        return None, reason(done.stderr) or f"exit code {done.returncode}"
    row = json.loads(done.stdout.splitlines()[-1])
    row["singular_values"] = tuple(row["singular_values"])
    return DeviceReport(**row), ""


def reason(stderr: str) -> str:
    r"""The line that says why a process ended: of a wrong flag if there is one, or the last one.

    >>> reason("F1127 08:53:52.676 9407 parse.cc:234] Unknown flag in XLA_FLAGS: --x=1\nstack")
    'Unknown flag in XLA_FLAGS: --x=1'
    """
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    flags = [line for line in said if "Unknown flag" in line]
    return re.sub(r"^[IWEF]\d{4} .*?\] ", "", (flags or said or [""])[-1])


def lines(found: Sequence[Finding]) -> Iterator[str]:
    """The findings as lines.

    >>> old = Finding("jax", "0.8.0, but optax-muon needs jax>=0.9.0", "pip install 'jax>=0.9.0'")
    >>> for line in lines([old]):
    ...     print(line)
    ! jax  0.8.0, but optax-muon needs jax>=0.9.0
           pip install 'jax>=0.9.0'
    """
    width = max(len(finding.about) for finding in found)
    for finding in found:
        yield f"{'!' if finding.is_wrong else ' '} {finding.about.ljust(width)}  {finding.fact}"
        if finding.fix:
            yield f"  {' ' * width}  {finding.fix}"
