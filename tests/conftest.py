"""Eight devices on one CPU, strict numerics, and a compilation cache shared by the workers."""

import os
import pathlib
import tempfile

# Before jax starts its backend: sharding tests need several devices, and compiling is most of what the tests do.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402

collect_ignore_glob = ["fixtures/make_*.py"]  # they need packages that the tests do without

CACHE = pathlib.Path(os.environ.get("PALIGN_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "palign-test-cache"))

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
