"""Processes that work together over loopback."""

import os
import pathlib
import socket
import subprocess
import sys


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_together(commands, seconds, environments=None):
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
        outputs = [each.communicate(timeout=seconds)[0] for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()
    return [each.returncode for each in started], outputs
