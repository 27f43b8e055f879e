"""A script that runs the tests that optax ships for its Muon on `compat.muon`.

Optax's tests look the optimizer up by name in modules of optax. This script binds these names to
ours before it loads the tests, in a process of its own so that nothing else is affected. The last
line of its output is a JSON object.
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

built = 0


def counted(factory):
    """Count the optimizers that the tests make, as evidence that they tested ours."""

    @functools.wraps(factory)  # tests read the signature
    def make(*args, **kwargs):
        global built
        built += 1
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
    json.dump({"ran": result.testsRun, "built": built, "failed": failed}, sys.stdout)


if __name__ == "__main__":
    main()
