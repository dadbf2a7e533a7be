import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)  # before any device is touched
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A shell ignores interrupts in what it runs in the background, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]

# Nearly all of the suite's time is XLA compiling; what one run or file compiled serves the next.
# Every process has a folder of its own, for none may read what another has half written.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla" / WORKER))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request: pytest.FixtureRequest) -> None:
    """Laws hold however a program is optimised; against the original it is so in full."""
    jax.config.update("jax_disable_most_optimizations", "parity" not in request.path.parts)
    # A program over several CPU devices that comes from the cache may wait for itself for ever.
    cached = not getattr(request.module, "SEVERAL_DEVICES", False)
    if jax.config.jax_enable_compilation_cache != cached:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Each compiled program has some memory maps of its own, of which Linux gives a process 65,530;
    with the next one XLA is gone without a word."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of the original's numbers (LIVEAVATAR_PARITY, default ../shared/parity)."""
    folder = Path(os.environ.get("LIVEAVATAR_PARITY", ROOT.parent / "shared" / "parity"))
    if not (folder / "index.json").exists():
        pytest.skip(f"no parity fixtures in {folder}; name their folder in LIVEAVATAR_PARITY")
    return folder
