"""Processes that tests start: how long they may take, and how they meet over loopback."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

SECONDS = 600
"""How long anything may take that is done in seconds: a busy machine may be very slow."""

_CANNOT_BIND = re.compile(
    r"address already in use|failed to (bind|add port|start RPC server)", re.I
)


def on_a_free_port(run):
    """Run with a port that was free a moment ago; with another one if it is taken by now.

    Args:
        run: from a port to exit codes and outputs, as `run_together` returns them.
    """
    codes, outputs = run(_free_port())
    taken = any(codes) and any(map(_CANNOT_BIND.search, outputs))
    return run(_free_port()) if taken else (codes, outputs)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_together(commands, environments=None):
    """Run Python with these arguments, all at once; wait for all, and leave none behind.

    Returns their exit codes and what they said.
    """
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=pathlib.Path(__file__).parents[1],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, environment in zip(commands, environments or [{}] * len(commands), strict=True)
    ]
    try:
        outputs = [each.communicate(timeout=SECONDS)[0] for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()
    return [each.returncode for each in started], outputs


def wait_until(condition, process):
    """Wait for what a process does; it may have ended when it has done it."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        ended = process.poll() is not None
        assert not ended or condition(), process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
