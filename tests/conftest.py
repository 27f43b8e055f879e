"""Fixtures that several rooms of tests share; the strict settings are in `../conftest.py`."""

import jax
import pytest


@pytest.fixture(scope="module")
def standard_promotion():
    """Standard dtype promotion, where other packages need it.

    `optax.adamw` adds a float to an int32 count; `jax.nn.dot_product_attention` promotes bfloat16.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A pattern of forty files of text that has something to learn."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = (f"def f{j}(x):\n    return x + {i * j}\n" for j in range(30))
        (folder / f"module{i}.py").write_text("\n".join(lines))
    return f"{folder}/*.py"
