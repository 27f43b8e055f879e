"""`optax-muon doctor`: facts, and for every wrong one the command that fixes it."""

import importlib.metadata

import pytest

from optax_muon import compiler_options
from optax_muon.cli import diagnosis, doctor
from optax_muon.cli.device_probe import DeviceReport
from optax_muon.cli.diagnosis import Finding
from optax_muon.cli.main import main


def report(platform, kind, **changed):
    fields = {
        "platform": platform,
        "kinds": {kind: 4},
        "memory": 2**34,
        "options": compiler_options(kind),
        "singular_values": (0.7, 1.1),
    }
    return DeviceReport(**{**fields, **changed})


V5P = report("tpu", "TPU v5")
CPU = report("cpu", "cpu", memory=None)


def installed(**versions):
    """A function like `importlib.metadata.version` that knows these packages."""

    def version(name):
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    return version


def requires(name):
    return {
        "optax-muon": ["jax>=0.9.0", "flax>=0.12.2; extra == 'train'", "torch; extra == 'peers'"],
        "jax": ["jaxlib<=0.10.2,>=0.10.1", 'libtpu==0.0.42.*; extra == "tpu"'],
    }[name]


def test_this_machine_is_described_in_a_process_of_its_own(capsys):
    """Whether it is healthy is not for a test to say, but every line is there."""
    try:
        main(["doctor"])
    except SystemExit as end:
        assert end.code == 1
    out = capsys.readouterr().out
    for about in ("jaxlib", "devices", "memory", "update", "compiler options", "XLA_FLAGS", "disk"):
        assert any(line[2:].startswith(about) for line in out.splitlines())
    assert "8 x cpu" not in out  # the devices of the other process, not of this one


def test_a_flag_that_ends_the_process_is_named(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert "! devices" in out and "--xla_no_such_flag=1" in out and "unset XLA_FLAGS" in out
    assert "1 check fails" in err or "checks fail" in err


def test_devices_that_never_start_are_not_waited_for():
    assert doctor.start_devices(timeout=0.05) == (None, "nothing after 0.05 seconds")


@pytest.mark.parametrize(
    ("versions", "about", "fix"),
    [
        ({"jax": "0.8.1"}, "jax", "pip install 'jax>=0.9.0'"),
        ({"jaxlib": "0.9.0"}, "jaxlib", "pip install 'jaxlib<=0.10.2,>=0.10.1'"),
        ({"flax": None}, "flax", "pip install 'flax>=0.12.2'"),
    ],
)
def test_a_version_that_is_not_allowed_is_named_with_one_that_is(versions, about, fix):
    found = {"optax_muon": "0.2.0", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
    found = {name: version for name, version in (found | versions).items() if version}
    [wrong] = [each for each in diagnosis.packages(installed(**found), requires) if each.is_wrong]
    assert (wrong.about, wrong.fix) == (about, fix)


def test_versions_that_are_allowed_are_facts():
    found = {"optax_muon": "0.2.0", "jax": "0.10.2", "jaxlib": "0.10.1", "flax": "0.13"}
    shown = list(diagnosis.packages(installed(**found), requires))
    assert [each.about for each in shown] == ["optax-muon", "jax", "flax", "jaxlib"]
    assert not any(each.is_wrong for each in shown)


@pytest.mark.parametrize(("running", "is_wrong"), [("tpu", True), ("cpu", False)])
def test_another_libtpu_is_wrong_where_it_runs_and_a_fact_where_it_compiles(running, is_wrong):
    version = installed(jax="0.10.2", libtpu="0.0.52")
    [found] = diagnosis.accelerator_packages(running, version, requires)
    assert found.fact == "0.0.52, but jax 0.10.2 needs libtpu==0.0.42.*"
    assert found.fix == ("pip install 'jax[tpu]==0.10.2'" if is_wrong else "")


@pytest.mark.parametrize(
    ("file", "extra"), [("nvidia0", "cuda13"), ("kfd", "rocm7-local"), ("accel0", "tpu")]
)
def test_an_accelerator_that_jax_does_not_use_is_pointed_out(tmp_path, file, extra):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / file).touch()
    [first, *_] = diagnosis.devices(CPU, "", {}, tmp_path)
    assert first.fix == f"pip install 'jax[{extra}]'"
    [first, *_] = diagnosis.devices(CPU, "", {"JAX_PLATFORMS": "cpu"}, tmp_path)
    assert not first.is_wrong


def test_an_update_that_is_not_orthogonal_is_wrong(tmp_path):
    bad = report("cpu", "cpu", singular_values=(0.0, 1.1))
    assert [f.about for f in diagnosis.devices(bad, "", {}, tmp_path) if f.is_wrong] == ["update"]


ALL_TO_ALL = "--xla_tpu_enable_async_all_to_all"


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (f"{ALL_TO_ALL}=false", "unset LIBTPU_INIT_ARGS"),
        (f"--other=3 {ALL_TO_ALL}=0", "export LIBTPU_INIT_ARGS=--other=3"),
        (f"--other='3 {ALL_TO_ALL}=0", "unset LIBTPU_INIT_ARGS"),
        ('"', "unset LIBTPU_INIT_ARGS"),
        (f"{ALL_TO_ALL}=True {ALL_TO_ALL}", None),
        ("--other=3", None),
        ("", None),
    ],
)
def test_only_a_flag_that_contradicts_an_option_is_wrong(flags, fix):
    found = diagnosis.options(V5P, {"LIBTPU_INIT_ARGS": flags})
    assert [each.fix for each in found if each.is_wrong] == ([fix] if fix else [])


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "no other processes"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "process 3 of 8"),
        ({"SLURM_JOB_ID": "7"}, "srun"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "process 1 of 2"),
    ],
)
def test_what_the_environment_says_of_other_processes(environ, words):
    [found] = diagnosis.clusters(environ)
    assert words in found.fact and not found.is_wrong


def test_a_cpu_without_the_instructions_is_no_fault():
    found = diagnosis.bfloat16(lambda: False)
    assert "float32" in found.fact and not found.is_wrong


def test_a_finding_is_wrong_if_it_is_to_be_fixed():
    assert Finding("a", "b", "c").is_wrong and not Finding("a", "b").is_wrong
