"""A look at this machine's processes, without a program that a bare system lacks."""

import collections
import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator

# Compilation is most of the suite's processor time. LLVM's optimizations change no claim of a test;
# the emitters of fusions cost a third of what is left, and what they emit is not ours to test.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
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


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Give a port that no other program is given meanwhile, and that a coordinator can listen at.

    It listens with SO_REUSEPORT, so it may share the address with a socket that does not listen.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def open_files(pid: int | str = "self") -> collections.Counter[str]:
    """Count a process's open files by what they are.

    `open_files() - before` is what was opened since and is still open. The end of files that
    earlier tests had open, which comes whenever it comes, does not show in it.
    """
    found: collections.Counter[str] = collections.Counter()
    for path in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, as that of this listing itself
            found[os.readlink(path)] += 1
    return found


def user_environment(devices: int = 1) -> dict[str, str]:
    """Return an environment for a program as a user starts it: with so many CPU devices.

    This process has 8. Programs are compiled fast there too.
    """
    flags = [*FAST_COMPILATION]
    if devices > 1:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
