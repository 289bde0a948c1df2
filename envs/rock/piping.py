"""Work on a stream of bytes in a thread of its own, with the other end on the event loop.

A pipe lies between them, so neither runs ahead of the other.
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

from envs.rock.wire.archive import PIECE_BYTES, Read

T = TypeVar("T")


async def produce(
    work: Callable[[Callable[[bytes], object]], object],
) -> AsyncGenerator[bytes, None]:
    """Yield what `work(write)` writes.

    Raises:
      Exception: what `work` raises.
    """
    read_end, write_end = os.pipe()

    def run() -> None:
        with open(write_end, "wb") as target:
            work(target.write)

    done = _in_thread(run)
    reader = asyncio.StreamReader(PIECE_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(read_end, "rb", 0))
    try:
        while piece := await reader.read(PIECE_BYTES):
            yield piece
        await done
    finally:
        transport.close()  # a thread that still writes gets an error
        await asyncio.wait([done])


async def consume(work: Callable[[Read], T], pieces: AsyncIterator[bytes]) -> T:
    """Return `work(read)`, where `read` returns the bytes of `pieces`.

    Raises:
      Exception: what `work` or `pieces` raises. After an error of `pieces` the work sees an end.
    """
    read_end, write_end = os.pipe()

    def run() -> T:
        with open(read_end, "rb", 0) as source:
            return work(source.read)

    done = _in_thread(run)
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, os.fdopen(write_end, "wb", 0)
    )
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    try:
        async for piece in pieces:
            if done.done():
                break
            writer.write(piece)
            await writer.drain()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the work has ended, and says why
    except BaseException:
        transport.abort()
        await asyncio.wait([done])
        raise
    finally:
        writer.close()
    return await asyncio.shield(done)


def _in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Run `work` in a new thread; unlike those of to_thread it is never waited for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            _report(loop, done, done.set_exception, error)
        else:
            _report(loop, done, done.set_result, result)

    done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # retrieved
    threading.Thread(target=run, name="rock-files", daemon=True).start()
    return done


def _report(
    loop: asyncio.AbstractEventLoop,
    done: "asyncio.Future[T]",
    settle: Callable[..., None],
    value: object,
) -> None:
    def tell() -> None:
        if not done.done():
            settle(value)

    try:
        loop.call_soon_threadsafe(tell)
    except RuntimeError:  # the loop is closed: nobody waits
        return
