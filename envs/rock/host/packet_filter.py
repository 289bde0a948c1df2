"""Classic BPF programs for the raw sockets of a sandbox's guard (egress.py)."""

import struct

SNAPPED_BYTES = 128  # of each packet that is kept
_LOAD_WORD = 0x20
_LOAD_BYTE = 0x30
_LOAD_BYTE_AFTER_X = 0x50
_X_IS_HEADER_LENGTH = 0xB1
_AND = 0x54
_IF_EQUAL = 0x15
_RETURN = 0x06
_NETWORK_HEADER = -0x100000  # SKF_NET_OFF: offsets from the IP header
_LOOPBACK_NET = 127
_MULTICAST = 0xFF
_TCP_FLAGS = 13  # offset in the TCP header
_SYN = 0x02
_SYN_OR_ACK = 0x12
_ECHO_REQUEST_4 = 8
_ECHO_REQUEST_6 = 128

# (operation, value[, label if true, label if false]), or a label
Instruction = tuple
Program = list[Instruction | str]


def build(ipv4: bool, protocol: str) -> bytes:
    """Return a program that keeps packets to other addresses than loopback's own.

    Of TCP it keeps only openings (SYN without ACK), of ICMP only echo requests. The kernel gives it
    an IPv4 packet from its IP header on, an IPv6 packet from what follows that header.

    Args:
      ipv4: whether the socket is of IPv4; otherwise it is of IPv6.
      protocol: "tcp", "udp" or "icmp".
    """
    program = _not_to_loopback_4() if ipv4 else _not_to_loopback_6()
    load = _LOAD_BYTE_AFTER_X if ipv4 else _LOAD_BYTE
    if protocol == "tcp":
        program += [
            (load, _TCP_FLAGS),
            (_AND, _SYN_OR_ACK),
            (_IF_EQUAL, _SYN, None, "dropped"),
        ]
    elif protocol == "icmp":
        echo_request = _ECHO_REQUEST_4 if ipv4 else _ECHO_REQUEST_6
        program += [(load, 0), (_IF_EQUAL, echo_request, None, "dropped")]
    program += [(_RETURN, SNAPPED_BYTES), "dropped", (_RETURN, 0)]
    return _assemble(program)


def _not_to_loopback_4() -> Program:
    return [
        (_LOAD_BYTE, 16),  # the destination's first byte
        (_IF_EQUAL, _LOOPBACK_NET, "dropped", None),
        (_X_IS_HEADER_LENGTH, 0),
    ]


def _not_to_loopback_6() -> Program:
    destination = _NETWORK_HEADER + 24
    return [
        (_LOAD_WORD, destination + 12),
        (_IF_EQUAL, 1, None, "elsewhere"),
        (_LOAD_WORD, destination),
        (_IF_EQUAL, 0, "dropped", None),  # ::1
        "elsewhere",
        (_LOAD_BYTE, destination),
        (_IF_EQUAL, _MULTICAST, "dropped", None),  # sent by the kernel itself
    ]


def _assemble(program: Program) -> bytes:
    """Return the array of struct sock_filter that the kernel takes."""
    places: dict[str, int] = {}
    instructions: list[Instruction] = []
    for item in program:
        if isinstance(item, str):
            places[item] = len(instructions)
        else:
            instructions.append(item)
    code = b""
    for place, (operation, value, *labels) in enumerate(instructions, 1):
        jumps = [places[label] - place if label else 0 for label in labels or (None, None)]
        code += struct.pack("HBBI", operation, *jumps, value & 0xFFFFFFFF)
    return code
