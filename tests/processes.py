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
