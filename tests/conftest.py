import gc
import importlib.metadata
import os

# Small factorisations stall when many threads of several workers share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the tests' time is XLA's: half of it without the expensive passes. 0 compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# And half of the rest with the older emitters for the CPU, in the versions that still have them.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_cpu_use_fusion_emitters=false"
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    and importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10."))
    else ""
)

import jax
import pytest

# Tests of many devices need some. The other tests stay on the first.
jax.config.update("jax_num_cpu_devices", 8)

# A silent broadcast is how a bias becomes a matrix: raise, in the tests only.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """What is imported stays: the collector needn't look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """Runs a test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def precision(request):
    """Runs a test in single and in double precision; gives eps."""
    with jax.enable_x64(request.param):
        yield 2.0**-52 if request.param else 2.0**-23
