"""Every test runs strictly: eight CPU devices, no silent promotion of dtypes or of ranks."""

import os
from collections.abc import Iterator

import jax
import pytest

# Two thirds of the tests' time are XLA's, and LLVM's optimization is most of that: without it they
# take 0.6 of the processor time. `XLA_FLAGS= make test` optimizes as a user's program is.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_module() -> Iterator[None]:
    """Let go of a module's compiled programs when its tests are over.

    Every program keeps regions of memory mapped, 5000 for one of the larger modules; Linux allows a
    process 65530 (`vm.max_map_count`), and past them XLA's compiler ends in a segmentation fault.
    """
    yield
    jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is compiled for TPUs where nothing compiles for them."""
    if item.get_closest_marker("libtpu"):
        pytest.importorskip("libtpu", reason="pip install optax-muon[tpu]")
