"""Every test runs on 8 CPU devices, with programs compiled fast and kept between runs.

The timings of benchmarks/ are taken without this file.
"""

import gc
import os
import pathlib

import pytest

from tests.processes import FAST_COMPILATION

# Files that take a minute or more come first, so that parallel workers end together.
LONG_FILES = (
    "tests/launch/test_train.py",
    "tests/launch/test_train_cpt.py",
    "tests/rome/train/",
    "tests/distributed/",
    "tests/rome/model/",
    "tests/rome/serve/",
    "tests/rome/losses/",
    "tests/launch/",
    "tests/rome/engine/",
)

# Looking for unreachable objects as often as Python does by default takes half of the time of
# collecting these tests, and a tenth of many: there are millions of objects, nearly all in use.
gc.set_threshold(50_000, 20, 100)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag in ("--xla_force_host_platform_device_count=8", *FAST_COMPILATION):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_finish() -> None:
    """Leave what was collected out of every later search for unreachable objects."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files by their time, and keep the tests of a file in their order."""

    def place(item: pytest.Item) -> int:
        fitting = (n for n, prefix in enumerate(LONG_FILES) if item.nodeid.startswith(prefix))
        return next(fitting, len(LONG_FILES))

    items.sort(key=place)
