"""The tests that optax ships for its own Muon pass on `compat.muon`."""

import json
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_optax_own_tests_pass():
    script = pathlib.Path(__file__).parents[1] / "optax_suite.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-5000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == [], done.stderr[-5000:]
    assert report["ran"] >= 48  # optax 0.2.8: 32 tests of Muon's own, 16 of every optimizer's
    assert report["built"] >= 48
