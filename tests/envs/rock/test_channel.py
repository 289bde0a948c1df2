"""Replies that nobody waits for any more when a sandbox's channel closes."""

import asyncio
import gc
import socket
from typing import Any

from envs.rock.embedded.channel import HolderChannel


def test_failures_that_nobody_waits_for_are_not_logged_as_lost():
    logged: list[dict[str, Any]] = []

    def relay(*_: Any) -> None:
        raise AssertionError("nothing is relayed")

    async def close_with_pending_replies() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: logged.append(told))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            channel = HolderChannel(ours, 1000, relay)  # its first message never comes
            channel.send({"op": "run"})
            channel.close()

    asyncio.run(close_with_pending_replies())
    gc.collect()
    assert logged == []
