import gc
import importlib.metadata
import os

# Small factorisations stall when many threads of several workers share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the tests' time is XLA's: half of it without the expensive passes. 0 compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# And half of the rest with the older emitters for the CPU, in the versions that still have them, and in one piece: to
# compile a program's parts in parallel helps nobody where every core has a worker.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

import jax
import pytest

# Tests of many devices need some. The other tests stay on the first.
jax.config.update("jax_num_cpu_devices", 8)

# A silent broadcast is how a bias becomes a matrix: raise, in the tests only.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """What is imported stays, and tracing makes many small objects: the collector needn't look at them all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


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
