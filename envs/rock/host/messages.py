"""Messages between the manager, the zygote and the holders: JSON and descriptors over a socket.

The sockets are of type SOCK_SEQPACKET, so one send is one message. An empty message means that the
other end closed its socket or died.
"""

import array
import json
import socket

MAX_MESSAGE = 1 << 18  # bytes of JSON
MAX_FDS = 8  # descriptors beside one message


def send(
    channel: socket.socket, message: dict, descriptors: tuple[int, ...] = (), flags: int = 0
) -> None:
    """Send one message with copies of the descriptors."""
    ancillary = []
    if descriptors:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors)))
    channel.sendmsg([json.dumps(message).encode()], ancillary, flags)


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Return one message and its descriptors, which are closed on exec; b"" at the end."""
    data, ancillary, _, _ = channel.recvmsg(
        MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) - len(content) % descriptors.itemsize
            descriptors.frombytes(content[:whole])
    return data, list(descriptors)


def parse(data: bytes) -> dict:
    """Return a message's fields; those of an error for the empty message."""
    if not data:
        return {"error": "the sandbox host process ended"}
    return json.loads(data)
