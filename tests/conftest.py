"""Fixtures that the tests of training share."""

import jax
import pytest


@pytest.fixture(scope="module")
def standard_promotion():
    """`optax.adamw` adds a float to an int32 count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty files of text that has something to learn."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = (f"def f{j}(x):\n    return x + {i * j}\n" for j in range(30))
        (folder / f"module{i}.py").write_text("\n".join(lines))
    return f"{folder}/*.py"
