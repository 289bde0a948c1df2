"""An event loop whose clock jumps to the next timer: seconds of waiting take none, and the same
program has the same order of events every time.
"""

import asyncio
import selectors


class _Selector:
    """Never sleeps; the time that it was asked to wait passes at once."""

    def __init__(self, loop):
        self._loop, self._real = loop, selectors.DefaultSelector()

    def select(self, timeout=None):
        ready = self._real.select(0)
        if not ready and timeout:
            self._loop.now += timeout
        return ready

    def __getattr__(self, name):
        return getattr(self._real, name)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self):
        return self.now


def run(coroutine):
    """asyncio.run in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)
