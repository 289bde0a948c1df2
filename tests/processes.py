"""A look at this machine's processes, without a program that a bare system lacks."""

import os
import pathlib

# Compilation is most of the suite's processor time. LLVM's optimizations change no claim of a test;
# the emitters of fusions cost a third of what is left, and what they emit is not ours to test.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
)


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

    This process has 8. Programs are compiled fast there too.
    """
    flags = [*FAST_COMPILATION]
    if devices > 1:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
