"""The guard of a sandbox's network namespace: it sees what looks for a way out, and lets through
what is granted.

The namespace has no interface but loopback, and every address in the world is made local to it. So
a packet to 8.8.8.8 arrives here, on loopback: nobody listens, the connection is refused at once,
and a raw socket has told the guard who was wanted. For a granted port the guard listens itself.
Names are resolved by the guard too, to addresses of its own choosing, so that a connection to one
of them says which name was meant; nothing about a name that is not granted leaves the sandbox. The
outer connection is made by the manager, outside.
"""

import errno
import os
import select
import socket
import struct
import time
from collections import namedtuple  # typing's would double what every sandbox is forked from

from . import linux

KEPT = 256  # denials that are described; the others are counted
BATCH, CATCH_UP, REST_SECONDS = (
    32,
    4,
    0.01,
)  # events served at once, and the pause after as many: a flood costs the flooder's sandbox time, not the host
MAX_NAMES = 4096
SNAPPED = 128  # bytes of a packet
DNS_TTL = 300
_FIRST_NAME = (
    (198 << 24) + (18 << 16) + 1
)  # 198.18.0.0/15 is set aside for tests of networks (RFC 2544)
_CONTROL = socket.CMSG_SPACE(64)
_A, _NXDOMAIN, _SERVFAIL = 1, 3, 2
_PROTOCOLS = {
    (socket.AF_INET, socket.IPPROTO_TCP): "tcp",
    (socket.AF_INET, socket.IPPROTO_UDP): "udp",
    (socket.AF_INET, socket.IPPROTO_ICMP): "icmp",
    (socket.AF_INET6, socket.IPPROTO_TCP): "tcp",
    (socket.AF_INET6, socket.IPPROTO_UDP): "udp",
    (socket.AF_INET6, socket.IPPROTO_ICMPV6): "icmp",
}
_IP_PKTINFO = 8


class Grant(namedtuple("Grant", ("name", "address", "port"))):
    """One thing that may be reached: envs.rock.config.parse_grant says what the fields mean."""

    def covers(self, name: str | None) -> bool:
        if self.name is None or name is None:
            return False
        return (
            name.endswith(self.name[1:]) and len(name) >= len(self.name)
            if self.name.startswith("*.")
            else name == self.name
        )


Way = namedtuple(
    "Way", ("name", "address", "port")
)  # a connection that may be made outside: to the address if there is one, else to the name


class Guard:
    """Made and used inside the network namespace, with its capabilities, before anything of an
    agent runs there.

    Raises: OSError where the kernel refuses. Its sockets stay in that namespace, wherever they are
    served from.
    """

    def __init__(self, grants: list[Grant]):
        self._grants = grants
        self.records: list[tuple[float, str, str, int]] = []  # (time, protocol, destination, port)
        self._uncounted = 0
        self._names: dict[str, str] = {}  # address inside -> name
        _make_every_address_local()
        # Not one packet socket for all: its end would wait for every processor of the host (10 ms),
        # that of a raw socket for none.
        self._ears = {
            ear.fileno(): ear for ear in (_listen_for(*kind) for kind in _PROTOCOLS) if ear
        }
        self._resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._resolver.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._resolver.bind(("0.0.0.0", 53))
        self._doors = {
            door.fileno(): door
            for door in (_listen(port) for port in sorted({grant.port for grant in grants}))
        }

    def descriptors(self) -> list[int]:
        """What to poll for reading."""
        return [*self._ears, self._resolver.fileno(), *self._doors]

    def serve(self, descriptor: int) -> list[tuple[Way, socket.socket]]:
        """Serve what is there; returns connections of the sandbox that may go on outside."""
        connections = []
        for _ in range(BATCH):
            try:
                if descriptor in self._ears:
                    self._read_packet(self._ears[descriptor])
                elif descriptor in self._doors:
                    connections += self._accept(self._doors[descriptor])
                else:
                    self._answer_query()
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                    break
        else:
            time.sleep(REST_SECONDS)
        return connections

    def denials(self) -> int:
        """How many there were. Of a flood, only those that could be read."""
        return len(self.records) + self._uncounted

    def catch_up(self) -> list[tuple[Way, socket.socket]]:
        """Serve what has come in, for an answer that counts all until now."""
        connections, poller = [], select.poll()
        for descriptor in self.descriptors():
            poller.register(descriptor, select.POLLIN)
        for _ in range(CATCH_UP):
            ready = poller.poll(0)
            connections += [one for descriptor, _ in ready for one in self.serve(descriptor)]
            if not ready:
                break
        return connections

    def close(self) -> None:
        """Where the guard lives on without its namespace's sockets (the Docker backend); a holder's
        end with it.
        """
        for one in (*self._ears.values(), self._resolver, *self._doors.values()):
            one.close()

    def _deny(self, protocol: str, destination: str, port: int) -> None:
        if len(self.records) < KEPT:
            self.records.append((time.time(), protocol, destination, port))
        else:
            self._uncounted += 1

    def _read_packet(self, ear: socket.socket) -> None:
        protocol = _PROTOCOLS[ear.family, ear.proto]
        data, ancillary, _, _ = ear.recvmsg(SNAPPED, _CONTROL)
        if ear.family == socket.AF_INET:
            address, start = socket.inet_ntoa(data[16:20]), 4 * (data[0] & 15)
        else:
            address, start = (
                next(
                    (socket.inet_ntop(socket.AF_INET6, content[:16]) for *_, content in ancillary),
                    "::",
                ),
                0,
            )
        source, port = (
            struct.unpack_from(">HH", data, start)
            if protocol != "icmp" and len(data) >= start + 4
            else (0, 0)
        )
        if protocol == "udp" and (source == 53 or (port == 53 and ear.family == socket.AF_INET)):
            return  # the guard's own answers, and what it is asked
        if protocol != "tcp" or not any(
            grant.port == port for grant in self._grants
        ):  # those are accepted, and then looked at
            self._deny(protocol, address, port)

    def _accept(self, door: socket.socket) -> list[tuple[Way, socket.socket]]:
        connection, _ = door.accept()
        address, port = connection.getsockname()
        name = self._names.get(address)
        for grant in self._grants:
            if grant.port == port and (
                grant.covers(name) or (grant.name is None and grant.address == address)
            ):
                return [(Way(name, grant.address, port), connection)]
        if not address.startswith("127."):
            self._deny("tcp", name or address, port)
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )  # refused, not ended
        connection.close()
        return []

    def _answer_query(self) -> None:
        query, ancillary, _, asker = self._resolver.recvmsg(512, _CONTROL)
        asked = next(
            (
                socket.inet_ntoa(content[8:12])
                for _, form, content in ancillary
                if form == _IP_PKTINFO
            ),
            "127.0.0.1",
        )
        question = _question(query)
        if question is None:
            if not asked.startswith("127."):
                self._deny("udp", asked, 53)
            return
        name, kind, end = question
        address, code = None, _NXDOMAIN
        if any(grant.covers(name) for grant in self._grants):
            address = self._address_of(name)
            code = 0 if address else _SERVFAIL
        elif (
            not self.records
            or self.records[-1][1:3] != ("dns", name)
            or time.time() - self.records[-1][0] > 1
        ):  # A and AAAA of one look-up
            self._deny("dns", name, 0)
        answer = (
            struct.pack(">HHHIH4s", 0xC00C, _A, 1, DNS_TTL, 4, socket.inet_aton(address))
            if address and kind == _A
            else b""
        )
        header = query[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, bool(answer), 0, 0)
        # From the address that was asked: a program may ask 8.8.8.8 itself, and takes no other's
        # answer.
        source = struct.pack("i4s4s", 0, socket.inet_aton(asked), b"\0" * 4)
        self._resolver.sendmsg(
            [header + query[12:end] + answer], [(socket.IPPROTO_IP, _IP_PKTINFO, source)], 0, asker
        )

    def _address_of(self, name: str) -> str | None:
        for address, known in self._names.items():
            if known == name:
                return address
        if len(self._names) >= MAX_NAMES:
            return None
        address = socket.inet_ntoa(struct.pack(">I", _FIRST_NAME + len(self._names)))
        self._names[address] = name
        return address


def _make_every_address_local() -> None:
    """What `ip route add local default dev lo` does, for both families."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.settimeout(5)
        for family in (socket.AF_INET, socket.AF_INET6):
            route = struct.pack(
                "8BI", family, 0, 0, 0, 255, 4, 254, 2, 0
            )  # table local, protocol static, scope host, type local
            route += struct.pack("HHI", 8, 4, socket.if_nametoindex("lo"))  # RTA_OIF
            kernel.send(
                struct.pack("IHHII", 16 + len(route), 24, 0x605, 1, 0) + route
            )  # RTM_NEWROUTE: request, acknowledge, create, exclusive
            code = -struct.unpack_from("i", kernel.recv(4096), 16)[0]
            if code and not (
                family == socket.AF_INET6
                and code in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EACCES, errno.ENODEV)
            ):
                raise OSError(
                    code, f"route to the guard: {os.strerror(code)}"
                )  # IPv6 may be switched off, and then it leads nowhere


def _listen(port: int) -> socket.socket:
    door = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind(("0.0.0.0", port))
    door.listen(64)
    return door


def _listen_for(family: int, protocol: int) -> socket.socket | None:
    """A raw socket that gets a copy of what comes for others than loopback's own addresses; None
    where the kernel has no such family.
    """
    try:
        ear = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return None
        raise
    linux.attach_filter(ear, _filter(family == socket.AF_INET, _PROTOCOLS[family, protocol]))
    if family == socket.AF_INET6:
        ear.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    return ear


def _filter(four: bool, protocol: str) -> bytes:
    """A classic BPF program: keep what goes elsewhere than to loopback; of TCP only openings (SYN
    without ACK), of ICMP only echo requests.

    The kernel hands it an IPv4 packet from its IP header on, an IPv6 packet from what follows that.
    """
    load_word, load_byte, equal, end = 0x20, 0x30, 0x15, 0x06
    if four:
        program = [
            (load_byte, 16),
            (equal, 127, "dropped", None),
            (0xB1, 0),
        ]  # X = the header's length
        here = lambda offset: (0x50, offset)  # A = the byte at X + offset
    else:
        header = -0x100000  # SKF_NET_OFF
        program = [
            (load_word, header + 36),
            (equal, 1, None, "elsewhere"),
            (load_word, header + 24),
            (equal, 0, "dropped", None),  # ::1
            "elsewhere",
            (load_byte, header + 24),
            (equal, 0xFF, "dropped", None),
        ]  # multicast is the kernel's own talk
        here = lambda offset: (load_byte, offset)
    if protocol == "tcp":
        program += [here(13), (0x54, 0x12), (equal, 0x02, None, "dropped")]
    elif protocol == "icmp":
        program += [here(0), (equal, 8 if four else 128, None, "dropped")]
    return _assembled([*program, (end, SNAPPED), "dropped", (end, 0)])


def _assembled(program: list) -> bytes:
    """Instructions (operation, value[, label if true, label if false]) and labels, as the kernel
    wants them.
    """
    places, instructions = {}, []
    for item in program:
        if isinstance(item, str):
            places[item] = len(instructions)
        else:
            instructions.append(item)
    code = b""
    for place, (operation, value, *jumps) in enumerate(instructions, 1):
        code += struct.pack(
            "HBBI",
            operation,
            *(places[jump] - place if jump else 0 for jump in jumps or (None, None)),
            value & 0xFFFFFFFF,
        )
    return code


def _question(query: bytes) -> tuple[str, int, int] | None:
    """(name, type, where it ends) of a DNS query with one question (RFC 1035, 4.1); None for
    anything else.
    """
    if len(query) < 17 or query[2] & 0xF8 or query[4:6] != b"\0\1":
        return None
    labels, place = [], 12
    while place < len(query) and (length := query[place]):
        if length > 63 or place + 1 + length > len(query):
            return None
        labels.append(query[place + 1 : place + 1 + length])
        place += 1 + length
    if place + 5 > len(query) or not labels:
        return None
    name = b".".join(labels).decode("ascii", errors="backslashreplace").lower()
    return name[:255], struct.unpack_from(">H", query, place + 1)[0], place + 5
