"""A look at this machine's processes, without a program that a bare system lacks."""

import os
import pathlib


def host_processes(word: str) -> int:
    """How many of the machine's processes, zombies not counted, have this in their command line."""
    found = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid()
        except OSError:
            continue
    return found


def user_environment(devices: int = 1) -> dict[str, str]:
    """Return an environment for a program as a user starts it: with so many CPU devices.

    This process has 8. LLVM's optimizations are off there too (see conftest.py).
    """
    flags = "--xla_backend_optimization_level=0"
    if devices > 1:
        flags += f" --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
