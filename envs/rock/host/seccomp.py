"""The system-call filter of every sandbox, as a classic BPF program for x86_64 and aarch64.

It is a deny list: what a shell task needs stays allowed; what enlarges the kernel's attack surface
(io_uring, bpf, unusual socket families, new user namespaces, keyrings, ...) fails with EPERM, and
so does what leaves the tree of processes that is killed (a clone with CLONE_PARENT) or makes others
wait for it (leases of files). Calls newer than this file fail with ENOSYS, and so do clone3, whose
flags a filter cannot read (libraries then use clone), and calls that take from a table of the whole
host (asynchronous I/O; glibc's uses threads). A foreign architecture kills the process.
"""

import errno
import functools
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NEWEST_CALL = 472  # calls above it have not been reviewed for this filter
X32_BIT = 0x40000000

# name: (x86_64, aarch64); None where the architecture never had the call.
Numbers = tuple[int | None, int | None]
DENIED: dict[str, Numbers] = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "setns": (308, 268),
    "unshare": (272, 97),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "nfsservctl": (180, 42),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "lookup_dcookie": (212, 18),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "memfd_secret": (447, 447),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "get_mempolicy": (239, 236),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "set_mempolicy_home_node": (450, 450),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "_sysctl": (156, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
}
ABSENT: dict[str, Numbers] = {
    "clone3": (435, 435),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    "io_destroy": (207, 1),
    "io_getevents": (208, 4),
    "io_submit": (209, 2),
    "io_cancel": (210, 3),
    "io_pgetevents": (333, 292),
}
# They succeed and do nothing: a sandbox's files are in memory, and `sync` would write the host's.
WITHOUT_EFFECT: dict[str, Numbers] = {"sync": (162, 81)}
# Watching files: where they are the host's, it would show what other programs do.
WATCHES: dict[str, Numbers] = {
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
}
# Scheduling of the process in the first argument; 0 is the caller.
SCHEDULING: dict[str, tuple[int, int]] = {
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
}
SHARED_IPC: dict[str, Numbers] = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
_SOCKET = (41, 198)
_SOCKETPAIR = (53, 199)
_IOCTL = (16, 29)
_CLONE = (56, 220)
_KILL = (62, 129)
_PRLIMIT = (302, 261)
_FCNTL = (72, 25)
_SETPRIORITY = (141, 140)
_IOPRIO_SET = (251, 30)

# CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
NEW_NAMESPACES = 0x7E020000
# It makes a child of the caller's parent: a command would get siblings outside init's tree.
CLONE_PARENT = 0x00008000
REFUSED_CLONE_FLAGS = NEW_NAMESPACES | CLONE_PARENT
TIOCSTI = 0x5412
TIOCLINUX = 0x541C
# Commands of fcntl: whoever opens a file waits for the holder of its lease; the other one watches.
F_SETLEASE = 1024
F_NOTIFY = 1026
PRIO_PROCESS = 0
IOPRIO_WHO_PROCESS = 1
AF_UNIX = 1
AF_INET = 2
AF_INET6 = 10
EVERY_PROCESS = 0xFFFFFFFF  # kill(-1)

Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, value
_LOAD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_GREATER = 0x25
_JUMP_BITS = 0x45
_RETURN = 0x06
# Offsets in seccomp_data; of an argument, that of its low half (little endian).
_NUMBER_OFFSET = 0
_ARCH_OFFSET = 4
_ARGUMENT_OFFSETS = (16, 24, 32)
ALLOW = 0x7FFF0000
KILL = 0x80000000
_ERRNO = 0x00050000


def _refuse(number: int) -> Instruction:
    """Return the instruction that lets the call fail with an errno."""
    return (_RETURN, 0, 0, _ERRNO | number)


@functools.cache
def build(architecture: str, *, network: bool, own_processes: bool = True) -> bytes:
    """Return the filter as the array of struct sock_filter that the kernel takes.

    Args:
      architecture: as platform.machine() returns it.
      network: the sandbox has namespaces of its own, so internet and unix sockets, System V IPC,
        watches of files and the scheduling of what it sees are harmless. False: no sockets but
        socketpair(AF_UNIX), no watches, and scheduling of the caller only, since nothing else would
        keep a process from the host's.
      own_processes: False where kill(-1) would reach processes outside the sandbox; it is then
        refused.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"no system-call filter for {architecture}; one exists for {', '.join(ARCHITECTURES)}"
        )
    column = list(ARCHITECTURES).index(architecture)
    program = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_JUMP_EQUAL, 1, 0, ARCHITECTURES[architecture]),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    # x32 calls carry X32_BIT, so this also closes that second table.
    program += [(_JUMP_GREATER, 0, 1, NEWEST_CALL), _refuse(errno.ENOSYS)]
    denied = DENIED if network else DENIED | SHARED_IPC
    absent = ABSENT if network else ABSENT | WATCHES
    tables = ((denied, errno.EPERM), (absent, errno.ENOSYS), (WITHOUT_EFFECT, 0))
    for table, answer in tables:
        for numbers in table.values():
            number = numbers[column]
            if number is not None:
                program += [(_JUMP_EQUAL, 0, 1, number), _refuse(answer)]
    socket_families = (AF_UNIX, AF_INET, AF_INET6) if network else ()
    program += _only(_SOCKET[column], 0, socket_families, errno.EAFNOSUPPORT)
    program += _only(_SOCKETPAIR[column], 0, (AF_UNIX,), errno.EAFNOSUPPORT)
    program += _never(_IOCTL[column], 1, (TIOCSTI, TIOCLINUX))
    program += _never(_FCNTL[column], 1, (F_SETLEASE, F_NOTIFY))
    # Only for the caller itself: the sandbox's process 1 has the same user id.
    program += _only(_PRLIMIT[column], 0, (0,), errno.EPERM)
    if not network:
        for scheduling in SCHEDULING.values():
            program += _only(scheduling[column], 0, (0,), errno.EPERM)
        program += _only_self(_SETPRIORITY[column], PRIO_PROCESS)
        program += _only_self(_IOPRIO_SET[column], IOPRIO_WHO_PROCESS)
    program += [
        (_JUMP_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _ARGUMENT_OFFSETS[0]),
        (_JUMP_BITS, 0, 1, REFUSED_CLONE_FLAGS),
        _refuse(errno.EPERM),
        (_RETURN, 0, 0, ALLOW),
    ]
    if not own_processes:
        program += _never(_KILL[column], 0, (EVERY_PROCESS,))
    program.append((_RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _only(number: int, argument: int, allowed: tuple[int, ...], answer: int) -> list[Instruction]:
    """Allow a call only with certain values of an argument; other calls are not affected.

    Args:
      number: of the call.
      argument: index of the argument.
      allowed: its values.
      answer: the errno of the call with other values.
    """
    body = [(_LOAD, 0, 0, _ARGUMENT_OFFSETS[argument])]
    for value in allowed:
        body += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, ALLOW)]
    body.append(_refuse(answer))
    return [(_JUMP_EQUAL, 0, len(body), number), *body]


def _only_self(number: int, kind: int) -> list[Instruction]:
    """Allow a call (kind, process, ...) only for processes, and there for the caller, which is 0.

    Args:
      number: of the call.
      kind: the value that stands for a process, not for a group or for all of a user.
    """
    body = [
        (_LOAD, 0, 0, _ARGUMENT_OFFSETS[0]),
        (_JUMP_EQUAL, 0, 3, kind),
        (_LOAD, 0, 0, _ARGUMENT_OFFSETS[1]),
        (_JUMP_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, ALLOW),
        _refuse(errno.EPERM),
    ]
    return [(_JUMP_EQUAL, 0, len(body), number), *body]


def _never(number: int, argument: int, refused: tuple[int, ...]) -> list[Instruction]:
    """Refuse a call with certain values of an argument; other calls are not affected.

    Args:
      number: of the call.
      argument: index of the argument.
      refused: its values, for which the call fails with EPERM.
    """
    body = [(_LOAD, 0, 0, _ARGUMENT_OFFSETS[argument])]
    for value in refused:
        body += [(_JUMP_EQUAL, 0, 1, value), _refuse(errno.EPERM)]
    body.append((_RETURN, 0, 0, ALLOW))
    return [(_JUMP_EQUAL, 0, len(body), number), *body]
