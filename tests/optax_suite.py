"""Run the tests that optax ships for its Muon with `compat.muon` in its place; a script of its own.

Optax's tests look the optimizer up by name, in modules of optax. Here these names are bound to ours
before the tests are loaded, in a process of their own, so that nothing else sees it. The last line
of the output is a JSON object.
"""

import functools
import importlib
import json
import sys
import unittest
from collections.abc import Iterator

from optax_muon import compat

SUITES = {
    "_muon_test": lambda test: True,
    "_common_test": lambda test: "opt_name='muon'" in str(test),  # one of some thirty optimizers
}

made = 0


def counted(factory):
    """Count what the tests make of it, to know that they made it of ours."""

    @functools.wraps(factory)  # tests read the signature
    def make(*args, **kwargs):
        global made
        made += 1
        return factory(*args, **kwargs)

    return make


def cases(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for entry in suite:
        if isinstance(entry, unittest.TestSuite):
            yield from cases(entry)
        else:
            yield entry


def main() -> None:
    for name in ("optax.contrib", "optax.contrib._muon"):
        module = importlib.import_module(name)
        module.muon = counted(compat.muon)
        module.scale_by_muon = counted(compat.scale_by_muon)
    chosen = unittest.TestSuite()
    for name, belongs in SUITES.items():
        module = importlib.import_module(f"optax.contrib.{name}")
        loaded = unittest.defaultTestLoader.loadTestsFromModule(module)
        chosen.addTests(test for test in cases(loaded) if belongs(test))
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=2).run(chosen)
    failed = [str(test) for test, _ in (*result.failures, *result.errors)]
    json.dump({"ran": result.testsRun, "made": made, "failed": failed}, sys.stdout)


if __name__ == "__main__":
    main()
