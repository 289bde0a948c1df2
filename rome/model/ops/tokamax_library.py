"""The library tokamax (kernels for GPUs; in requirements-cuda.txt only), loaded when it is used."""

from __future__ import annotations

from types import ModuleType

from absl import flags


def load_tokamax() -> ModuleType:
    """Import tokamax, and keep it from reading this process's arguments as its own.

    Its options are absl flags. Where a program has not parsed any (pytest, a notebook), it would
    parse sys.argv at its first kernel and fail on what it does not know.
    """
    import tokamax

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return tokamax
