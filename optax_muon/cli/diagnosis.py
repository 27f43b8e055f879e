"""What `optax-muon doctor` checks: each check is a function from what is found to findings.

A finding is a fact; where something is wrong it also has the command that fixes it. Nothing here
starts a device: `device_probe.py` has done that in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

import optax_muon
from optax_muon.cli.device_probe import DeviceReport
from optax_muon.compilers import options_row
from optax_muon.platforms import bfloat16_instructions, get_platform, peak_flops

PACKAGE = "optax-muon"
EXTRA = "train"
"""The extra whose packages the commands need."""
_PLATFORM = {"tpu": "tpu", "cuda12": "gpu", "cuda13": "gpu", "rocm7-local": "gpu"}
"""Extras of jax whose packages are checked where they are installed, and whose devices they run."""
ORTHOGONAL = (0.5, 1.5)
"""Where the singular values of an update lie. Five steps of `KELLER` end between 0.68 and 1.14."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    about: str
    """What was looked at."""
    fact: str
    """What was found."""
    fix: str = ""
    """The command that fixes it; empty where nothing is wrong."""

    @property
    def is_wrong(self) -> bool:
        """Whether something has to be fixed."""
        return bool(self.fix)


Version = Callable[[str], str]
"""The installed version of a distribution, as `importlib.metadata.version` returns it."""


def packages(
    version: Version = importlib.metadata.version,
    requires: Callable[[str], list[str] | None] = importlib.metadata.requires,
) -> Iterator[Finding]:
    """The versions of what optax-muon runs on, against what its own metadata and jax's allow."""
    try:
        ours = [*map(Requirement, requires(PACKAGE) or ())]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(PACKAGE, "is not installed, only imported", f"pip install -e '.[{EXTRA}]'")
        return
    yield Finding(PACKAGE, optax_muon.__version__)
    needed = [
        need for need in ours if need.marker is None or need.marker.evaluate({"extra": EXTRA})
    ]
    for need in (each for each in needed if each.name != PACKAGE):
        yield from _version(need, PACKAGE, version)
    for need in map(Requirement, requires("jax") or ()):
        if need.name == "jaxlib" and need.marker is None:
            yield from _version(need, "jax", version)


def accelerator_packages(
    running: str | None,
    version: Version = importlib.metadata.version,
    requires: Callable[[str], list[str] | None] = importlib.metadata.requires,
) -> Iterator[Finding]:
    """The packages for TPUs and GPUs that are installed, against those that jax was built with.

    Args:
        running: Platform of the devices; another version than jax's is wrong where it is used, and
            a mere fact where it only compiles ahead of time.
        version: As `packages` takes it.
        requires: As `packages` takes it.
    """
    for extra in _PLATFORM:
        for need in map(Requirement, requires("jax") or ()):
            used = need.marker is not None and need.marker.evaluate({"extra": extra})
            if used and need.name.startswith(("libtpu", "jax-")) and _found(need.name, version):
                for finding in _version(need, f"jax {version('jax')}", version):
                    is_wrong = finding.is_wrong and running == _PLATFORM[extra]
                    fix = f"pip install 'jax[{extra}]=={version('jax')}'" if is_wrong else ""
                    yield dataclasses.replace(finding, fix=fix)


def _found(name: str, version: Version) -> str | None:
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(need: Requirement, by: str, version: Version) -> Iterator[Finding]:
    found = _found(need.name, version)
    wanted = f"{need.name}{need.specifier}"
    if found is None:
        yield Finding(
            need.name, f"is not installed; {by} needs {wanted}", f"pip install '{wanted}'"
        )
    elif need.specifier.contains(found, prereleases=True):
        yield Finding(need.name, found)
    else:
        yield Finding(need.name, f"{found}, but {by} needs {wanted}", f"pip install '{wanted}'")


def devices(
    report: DeviceReport | None, error: str, environ: Mapping[str, str], root: Path = Path("/")
) -> Iterator[Finding]:
    """The devices, their memory, and whether an accelerator lies idle.

    Args:
        report: What the probe found; None if it failed.
        error: How it failed.
        environ: The environment.
        root: Where the device files are looked for.
    """
    if report is None:
        yield Finding("devices", f"do not start: {error}", _restart(error))
        return
    found = ", ".join(f"{count} x {kind}" for kind, count in report.kinds.items())
    asked = environ.get("JAX_PLATFORMS", "")
    chosen = f" (JAX_PLATFORMS={asked})" if asked else ""
    idle = next((each for each in _ACCELERATORS if _exist(root, each.files)), None)
    if idle and report.platform == "cpu" and not asked:
        yield Finding(
            "devices",
            f"{found}, though this machine has {idle.name} that jax does not use",
            f"pip install 'jax[{idle.extra}]'",
        )
    else:
        yield Finding("devices", f"{found}, platform {report.platform}{chosen}")
    yield Finding("memory", _memory(report))
    yield from _peak(report)
    lowest, highest = report.singular_values
    values = f"the singular values of an update lie between {lowest:.2f} and {highest:.2f}"
    orthogonal = ORTHOGONAL[0] < lowest <= highest < ORTHOGONAL[1]
    yield Finding(
        "update",
        f"compiled and run; {values}",
        "" if orthogonal else "JAX_PLATFORMS=cpu optax-muon doctor  # are they right on the CPU?",
    )


class _Accelerator(NamedTuple):
    """An accelerator that a machine may have."""

    name: str
    """What it is called, with its article."""
    files: tuple[str, ...]
    """Its device files, as globs below the root."""
    extra: str
    """The extra of jax with its packages."""


_ACCELERATORS = (
    _Accelerator("an NVIDIA GPU", ("dev/nvidia[0-9]*",), "cuda13"),
    _Accelerator("an AMD GPU", ("dev/kfd",), "rocm7-local"),
    _Accelerator("a TPU", ("dev/accel[0-9]*", "dev/vfio/[0-9]*"), "tpu"),
)


def _exist(root: Path, patterns: Iterable[str]) -> bool:
    return any(True for pattern in patterns for _ in root.glob(pattern))


def _restart(error: str) -> str:
    """What to do about devices that do not start."""
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        if name in error:
            return f"unset {name}"
    return "JAX_PLATFORMS=cpu optax-muon doctor  # without the accelerator, which others may hold"


def _memory(report: DeviceReport) -> str:
    if report.memory is not None:
        return f"{report.memory / 2**30:.1f} GiB of a device"
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{host / 2**30:.1f} GiB of this machine, which the devices share"


def _peak(report: DeviceReport) -> Iterator[Finding]:
    dtype = get_platform(report.platform).compute_dtype
    [kind, *_] = report.kinds
    peak = peak_flops(kind)
    known = "unknown, so progress shows no MFU" if peak is None else f"{peak / 1e12:.0f} TFLOP/s"
    yield Finding("arithmetic", f"Muon multiplies in {dtype}; peak in bfloat16: {known}")


def bfloat16(
    instructions: Callable[[], bool | None] = bfloat16_instructions, machine: str = ""
) -> Finding:
    """Whether the CPU multiplies bfloat16; a fact, as nothing can be done about it."""
    found = {
        None: "unknown on this system",
        True: "yes",
        False: "none: --dtype float32 takes about half the time of bfloat16 on this CPU",
    }[instructions()]
    name = machine or platform.machine()
    return Finding("bfloat16 instructions of the CPU", f"{found} ({name})")


def options(report: DeviceReport, environ: Mapping[str, str]) -> Iterator[Finding]:
    """The compiler's options for the device, and what the environment sets against them."""
    [kind, *_] = report.kinds
    row = options_row(kind)
    of = f"of {row}" if row else f"of every {report.platform}, as {kind!r} has none of its own"
    words = " ".join(f"--{name}={value}" for name, value in report.options.items()) or "none"
    yield Finding("compiler options", f"{words} ({of}); the compiler accepts them")
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        yield from _flags(variable, environ.get(variable), report.options)


def _flags(variable: str, value: str | None, wanted: Mapping[str, str]) -> Iterator[Finding]:
    """What a variable sets."""
    if value is None:
        yield Finding(variable, "is not set")
        return
    try:
        flags = shlex.split(value)
    except ValueError:
        yield Finding(variable, f"{value} has a quotation that does not end", f"unset {variable}")
        return
    against = [flag for flag in flags if _contradicts(flag, wanted)]
    if not against:
        yield Finding(variable, value or "is empty")
        return
    kept = " ".join(flag for flag in flags if flag not in against)
    yield Finding(
        variable,
        f"{' '.join(against)} contradicts the options above, which overlap communication with"
        " matmuls",
        f"export {variable}={shlex.quote(kept)}" if kept else f"unset {variable}",
    )


def _contradicts(flag: str, wanted: Mapping[str, str]) -> bool:
    """Whether a flag sets one of the options to something else; a bare flag is `true`."""
    name, _, value = flag.lstrip("-").partition("=")
    return name in wanted and _truth(value or "true") != _truth(wanted[name])


def _truth(value: str) -> str:
    return {"1": "true", "0": "false"}.get(value.lower(), value.lower())


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How one kind of cluster tells a process about the others."""

    name: str
    """Its name."""
    variable: str
    """The variable that shows it."""
    count: str
    """The variable with the number of processes, or with their comma-separated names."""
    rank: str
    """The variable with the number of this one."""
    hint: str
    """What to say where that variable is set and the others are not."""


CLUSTERS = (
    Cluster(
        "SLURM",
        "SLURM_JOB_ID",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "start it with: srun --ntasks-per-node=GPUS optax-muon train --distributed --mesh data=N",
    ),
    Cluster(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "start it with mpirun",
    ),
    Cluster(
        "TPU workers",
        "TPU_WORKER_HOSTNAMES",
        "TPU_WORKER_HOSTNAMES",
        "TPU_WORKER_ID",
        "set TPU_WORKER_ID to the number of this worker",
    ),
    Cluster(
        "JAX's own variables",
        "JAX_COORDINATOR_ADDRESS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "set JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start it under a scheduler",
    ),
)
"""The variables that `jax.distributed.initialize` and its users read."""


def clusters(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What the environment says of other processes."""
    seen = False
    for each in CLUSTERS:
        if each.variable not in environ:
            continue
        seen = True
        if each.count in environ and each.rank in environ:
            names = environ[each.count]
            count = names if names.isdigit() else str(len(names.split(",")))
            fact = f"{each.name}: process {environ[each.rank]} of {count}, counted from 0"
        else:
            fact = f"{each.name}: {each.variable} is set, but no process number; {each.hint}"
        yield Finding("distributed", fact)
    if not seen:
        yield Finding("distributed", "the environment describes no other processes")


def disk(folder: Path) -> Finding:
    """Space for checkpoints; a trial keeps three times its parameters, twice."""
    free = shutil.disk_usage(folder).free
    return Finding("disk", f"{free / 2**30:.1f} GiB free in {folder}")
