"""The guard of a sandbox's network: it records what looks for a way out and passes what is granted.

The namespace has no interface but loopback, and every address is made local to it. So a packet to
8.8.8.8 arrives on loopback: nothing listens there, the connection is refused at once, and the
guard's raw socket records the destination. On granted ports the guard itself listens. The guard
also answers DNS, with addresses of its own choosing, so that a connection to one of them shows
which name was meant; a name that is not granted never leaves the sandbox. The manager makes the
outer connections.
"""

import errno
import os
import select
import socket
import struct
import time
from collections import namedtuple  # typing's would double what every sandbox is forked from

from . import linux, packet_filter

MAX_RECORDS = 256  # denials that are described; the others are only counted
# After BATCH events the guard rests: a flood costs the flooder's sandbox time, not the host.
BATCH = 32
REST_SECONDS = 0.01
CATCH_UP_ROUNDS = 4
MAX_NAMES = 4096
MAX_NAME_CHARACTERS = 255
MAX_QUERY_BYTES = 512
LISTEN_BACKLOG = 64
SAME_LOOKUP_SECONDS = 1  # in which a second query for a name belongs to the first
DNS_TTL_SECONDS = 300
DNS_PORT = 53
DNS_HEADER_BYTES = 12
# 198.18.0.0/15 is set aside for tests of networks (RFC 2544).
_FIRST_NAME = (198 << 24) + (18 << 16) + 1
_CONTROL_BYTES = socket.CMSG_SPACE(64)
_TYPE_A = 1
_NO_ERROR = 0
_SERVFAIL = 2
_NXDOMAIN = 3
_DNS_RESPONSE = 0x8180  # response, recursion desired and available
_NAME_OF_QUESTION = 0xC00C  # a pointer to the name at offset 12
_PROTOCOLS: dict[tuple[int, int], str] = {
    (socket.AF_INET, socket.IPPROTO_TCP): "tcp",
    (socket.AF_INET, socket.IPPROTO_UDP): "udp",
    (socket.AF_INET, socket.IPPROTO_ICMP): "icmp",
    (socket.AF_INET6, socket.IPPROTO_TCP): "tcp",
    (socket.AF_INET6, socket.IPPROTO_UDP): "udp",
    (socket.AF_INET6, socket.IPPROTO_ICMPV6): "icmp",
}
_IP_PKTINFO = 8
_RTM_NEWROUTE = 24
_RTA_OIF = 4
_ROUTE_FLAGS = 0x605  # request, acknowledge, create, exclusive
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EACCES, errno.ENODEV)

# A connection that may be made outside: to the address if there is one, else to the name.
Way = namedtuple("Way", ("name", "address", "port"))


class Grant(namedtuple("Grant", ("name", "address", "port"))):
    """One thing that may be reached; envs.rock.config.parse_grant says what the fields mean."""

    def covers(self, name: str | None) -> bool:
        """Return whether the grant is for this host name."""
        if self.name is None or name is None:
            return False
        if self.name.startswith("*."):
            return name.endswith(self.name[1:]) and len(name) >= len(self.name)
        return name == self.name


class Guard:
    """The guard of the network namespace that the calling thread is in.

    Make it with the namespace's capabilities, before anything of an agent runs there. Its sockets
    stay in that namespace, wherever they are served from.

    Attributes:
      records: (time, protocol, destination, port) of the first MAX_RECORDS denials.
    """

    def __init__(self, grants: list[Grant]):
        """Listen in the namespace; OSError where the kernel refuses that."""
        self._grants = grants
        self._granted_ports = {grant.port for grant in grants}
        self.records: list[tuple[float, str, str, int]] = []
        self._unrecorded = 0
        self._names: dict[str, str] = {}  # address inside -> name
        _make_every_address_local()
        # Not one packet socket for all: closing it would wait for every processor of the host
        # (10 ms), closing a raw socket waits for none.
        self._raw_sockets: dict[int, socket.socket] = {}
        for family, protocol in _PROTOCOLS:
            raw = _open_raw(family, protocol)
            if raw is not None:
                self._raw_sockets[raw.fileno()] = raw
        self._resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._resolver.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._resolver.bind(("0.0.0.0", DNS_PORT))
        self._listeners: dict[int, socket.socket] = {}
        for port in sorted(self._granted_ports):
            listener = _listen(port)
            self._listeners[listener.fileno()] = listener

    def descriptors(self) -> list[int]:
        """Return the descriptors to poll for reading."""
        return [*self._raw_sockets, self._resolver.fileno(), *self._listeners]

    def serve(self, descriptor: int) -> list[tuple[Way, socket.socket]]:
        """Handle what a descriptor has received; return the sandbox's granted connections."""
        connections: list[tuple[Way, socket.socket]] = []
        for _ in range(BATCH):
            try:
                if descriptor in self._raw_sockets:
                    self._read_packet(self._raw_sockets[descriptor])
                elif descriptor in self._listeners:
                    connections += self._accept(self._listeners[descriptor])
                else:
                    self._answer_query()
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                    break
        else:
            time.sleep(REST_SECONDS)
        return connections

    def denials(self) -> int:
        """Return how many attempts were denied; of a flood, only those that could be read."""
        return len(self.records) + self._unrecorded

    def catch_up(self) -> list[tuple[Way, socket.socket]]:
        """Serve everything that has arrived; return the sandbox's granted connections."""
        connections: list[tuple[Way, socket.socket]] = []
        poller = select.poll()
        for descriptor in self.descriptors():
            poller.register(descriptor, select.POLLIN)
        for _ in range(CATCH_UP_ROUNDS):
            ready = poller.poll(0)
            if not ready:
                break
            for descriptor, _ in ready:
                connections += self.serve(descriptor)
        return connections

    def close(self) -> None:
        """Close the sockets, where the process outlives the namespace (the Docker backend)."""
        for one in (*self._raw_sockets.values(), self._resolver, *self._listeners.values()):
            one.close()

    def _deny(self, protocol: str, destination: str, port: int) -> None:
        if len(self.records) < MAX_RECORDS:
            self.records.append((time.time(), protocol, destination, port))
        else:
            self._unrecorded += 1

    def _read_packet(self, raw: socket.socket) -> None:
        protocol = _PROTOCOLS[raw.family, raw.proto]
        data, ancillary, _, _ = raw.recvmsg(packet_filter.SNAPPED_BYTES, _CONTROL_BYTES)
        is_ipv4 = raw.family == socket.AF_INET
        if is_ipv4:
            address = socket.inet_ntoa(data[16:20])
            start = 4 * (data[0] & 15)
        else:
            address = _destination_6(ancillary)
            start = 0
        source = 0
        port = 0
        if protocol != "icmp" and len(data) >= start + 4:
            source, port = struct.unpack_from(">HH", data, start)
        if protocol == "udp" and source == DNS_PORT:
            return  # the guard's own answer
        if protocol == "udp" and port == DNS_PORT and is_ipv4:
            return  # a query, which _answer_query sees too
        if protocol == "tcp" and port in self._granted_ports:
            return  # it is accepted and then looked at
        self._deny(protocol, address, port)

    def _accept(self, listener: socket.socket) -> list[tuple[Way, socket.socket]]:
        connection, _ = listener.accept()
        address, port = connection.getsockname()
        name = self._names.get(address)
        for grant in self._grants:
            if grant.port != port:
                continue
            if grant.covers(name) or (grant.name is None and grant.address == address):
                return [(Way(name, grant.address, port), connection)]
        if not address.startswith("127."):
            self._deny("tcp", name or address, port)
        # Reset the connection instead of ending it: the sandbox sees a refusal.
        reset = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()
        return []

    def _answer_query(self) -> None:
        query, ancillary, _, asker = self._resolver.recvmsg(MAX_QUERY_BYTES, _CONTROL_BYTES)
        asked = _destination_4(ancillary)
        question = _question(query)
        if question is None:
            if not asked.startswith("127."):
                self._deny("udp", asked, DNS_PORT)
            return
        name, kind, end = question
        code, address = self._resolve(name)
        answer = b""
        if address and kind == _TYPE_A:
            packed = socket.inet_aton(address)
            answer = struct.pack(
                ">HHHIH4s", _NAME_OF_QUESTION, _TYPE_A, 1, DNS_TTL_SECONDS, 4, packed
            )
        header = query[:2] + struct.pack(">HHHHH", _DNS_RESPONSE | code, 1, bool(answer), 0, 0)
        reply = header + query[DNS_HEADER_BYTES:end] + answer
        # From the address that was asked: a program that asks 8.8.8.8 takes no other's answer.
        source = struct.pack("i4s4s", 0, socket.inet_aton(asked), b"\0" * 4)
        self._resolver.sendmsg([reply], [(socket.IPPROTO_IP, _IP_PKTINFO, source)], 0, asker)

    def _resolve(self, name: str) -> tuple[int, str | None]:
        """Return a response code and the address for a name; record a denial if not granted."""
        if any(grant.covers(name) for grant in self._grants):
            address = self._address_of(name)
            return (_NO_ERROR if address else _SERVFAIL), address
        if not self._was_just_denied(name):
            self._deny("dns", name, 0)
        return _NXDOMAIN, None

    def _was_just_denied(self, name: str) -> bool:
        """Return whether the last denial was of this name: a look-up asks for A and AAAA."""
        if not self.records:
            return False
        moment, protocol, destination, _ = self.records[-1]
        if (protocol, destination) != ("dns", name):
            return False
        return time.time() - moment <= SAME_LOOKUP_SECONDS

    def _address_of(self, name: str) -> str | None:
        """Return the address inside that stands for a name; None if all are taken."""
        for address, known in self._names.items():
            if known == name:
                return address
        if len(self._names) >= MAX_NAMES:
            return None
        address = socket.inet_ntoa(struct.pack(">I", _FIRST_NAME + len(self._names)))
        self._names[address] = name
        return address


def _destination_4(ancillary: list[tuple[int, int, bytes]]) -> str:
    """Return the address that a packet was sent to, from IP_PKTINFO."""
    for _, kind, content in ancillary:
        if kind == _IP_PKTINFO:
            return socket.inet_ntoa(content[8:12])
    return "127.0.0.1"


def _destination_6(ancillary: list[tuple[int, int, bytes]]) -> str:
    """Return the address that a packet was sent to, from IPV6_PKTINFO."""
    for _, _, content in ancillary:
        return socket.inet_ntop(socket.AF_INET6, content[:16])
    return "::"


def _make_every_address_local() -> None:
    """Do what `ip route add local default dev lo` does, for IPv4 and IPv6.

    IPv6 may be switched off, and then it leads nowhere.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.settimeout(5)
        for family in (socket.AF_INET, socket.AF_INET6):
            kernel.send(_route_request(family))
            (result,) = struct.unpack_from("i", kernel.recv(4096), 16)
            code = -result
            is_without_ipv6 = family == socket.AF_INET6 and code in _NO_IPV6
            if code and not is_without_ipv6:
                raise OSError(code, f"route to the guard: {os.strerror(code)}")


def _route_request(family: int) -> bytes:
    """Return the netlink message that adds the route."""
    loopback = socket.if_nametoindex("lo")
    # Type local, scope host, protocol static, table local.
    route = struct.pack("8BI", family, 0, 0, 0, 255, 4, 254, 2, 0)
    route += struct.pack("HHI", 8, _RTA_OIF, loopback)
    length = 16 + len(route)
    header = struct.pack("IHHII", length, _RTM_NEWROUTE, _ROUTE_FLAGS, 1, 0)
    return header + route


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(LISTEN_BACKLOG)
    return listener


def _open_raw(family: int, protocol: int) -> socket.socket | None:
    """Return a raw socket that gets a copy of what is sent to other addresses than loopback's.

    None where the kernel lacks the family.
    """
    try:
        raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return None
        raise
    program = packet_filter.build(family == socket.AF_INET, _PROTOCOLS[family, protocol])
    linux.attach_filter(raw, linux.Filter(program))
    if family == socket.AF_INET6:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    return raw


def _question(query: bytes) -> tuple[str, int, int] | None:
    """Parse a DNS query with one question (RFC 1035, 4.1).

    Returns:
      (name, type, offset where the question ends); None for anything else.
    """
    if len(query) < 17 or query[2] & 0xF8 or query[4:6] != b"\0\1":
        return None
    labels = []
    place = DNS_HEADER_BYTES
    while place < len(query) and (length := query[place]):
        end = place + 1 + length
        if length > 63 or end > len(query):
            return None
        labels.append(query[place + 1 : end])
        place = end
    if place + 5 > len(query) or not labels:
        return None
    (kind,) = struct.unpack_from(">H", query, place + 1)
    return _printable(b".".join(labels)), kind, place + 5


def _printable(name: bytes) -> str:
    r"""Return a host name in lower case, with other bytes than printable ASCII as \xNN.

    An agent chooses the bytes. The name travels as JSON, in which a control character takes six
    bytes, and is read in logs and terminals.
    """
    characters = []
    for byte in name.lower()[:MAX_NAME_CHARACTERS]:
        characters.append(chr(byte) if 0x20 < byte < 0x7F else f"\\x{byte:02x}")
    return "".join(characters)[:MAX_NAME_CHARACTERS]
