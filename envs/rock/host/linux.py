"""The few system calls that the standard library lacks, through ctypes.

Linux on x86_64 and aarch64.
"""

import ctypes
import errno
import fcntl
import os
import platform
import resource
import signal
import socket
import stat
import struct
from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = (
    0x00020000,
    0x02000000,
    0x04000000,
    0x08000000,
)
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    4096,
    16384,
    1 << 18,
)  # the first four are also mount_setattr's
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = (
    1,
    22,
    24,
    36,
    38,
)
SYS_OPENAT2, SYS_MOUNT_SETATTR = 437, 442  # one number on every architecture, as all from 424 on
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
SYS_PIVOT_ROOT, SYS_CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(
    platform.machine(), (0, 0)
)
RESOLVE_NO_MAGICLINKS, RESOLVE_BENEATH = 0x02, 0x08
AT_FDCWD, AT_RECURSIVE, MNT_DETACH = -100, 0x8000, 2
SIOCSIFFLAGS, SIOCOUTQ, IFF_UP, SO_ATTACH_FILTER = 0x8914, 0x5411, 1, 26

# descriptors handed to a new program lie from here on; a holder's own ones below
FIRST_PASSED_FD = 80
ARCHITECTURE = platform.machine()


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encode = lambda text: None if text is None else os.fsencode(text)
    result = _libc.mount(
        encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data)
    )
    _check(result, f"mount {source} on {target}")


def restrict_mount(path: str, flags: int, recursive: bool = False) -> None:
    """Add MS_RDONLY, MS_NOSUID, ... to the mount at `path` (and those below it), keeping what it
    has.
    """
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    syscall(
        f"mount_setattr {path}",
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        ctypes.c_char_p(os.fsencode(path)),
        AT_RECURSIVE if recursive else 0,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
    )


def pivot_root(new: str, old: str) -> None:
    syscall(
        "pivot_root",
        SYS_PIVOT_ROOT,
        ctypes.c_char_p(os.fsencode(new)),
        ctypes.c_char_p(os.fsencode(old)),
    )


def detach(path: str) -> None:
    """Unmount it and all below it as soon as nobody uses it; it is out of sight at once."""
    _check(_libc.umount2(os.fsencode(path), ctypes.c_int(MNT_DETACH)), f"umount {path}")


def setns(descriptor: int, kind: int) -> None:
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)), "setns")


def drop_bounding_set() -> None:
    """No program that this process or its children execute gets a capability."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        prctl(PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    """This process's own ones, for good."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    none = (ctypes.c_uint32 * 6)()
    syscall("capset", SYS_CAPSET, ctypes.byref(header), ctypes.byref(none))


def raise_loopback() -> None:
    """Set the loopback interface of a new network namespace up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def prctl(option: int, value: int, pointer: object = None) -> None:
    zero = ctypes.c_ulong(0)
    _check(
        _libc.prctl(
            ctypes.c_int(option),
            ctypes.c_ulong(value),
            pointer if pointer is not None else zero,
            zero,
            zero,
        ),
        f"prctl {option}",
    )


def install_filter(program: bytes) -> None:
    """Load a seccomp filter (seccomp.build) into this process, for good.

    Needs no_new_privs or root.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    prctl(
        PR_SET_SECCOMP,
        2,
        ctypes.byref(_FilterProgram(len(program) // 8, ctypes.addressof(instructions))),
    )


def unread_bytes(sender: socket.socket) -> int:
    """Memory of what was sent on a unix socket and not yet received."""
    return struct.unpack("i", fcntl.ioctl(sender, SIOCOUTQ, b"\0" * 4))[0]


def attach_filter(receiver: socket.socket, program: bytes) -> None:
    """Let a socket receive only what a classic BPF program keeps."""
    instructions = ctypes.create_string_buffer(program, len(program))
    receiver.setsockopt(
        socket.SOL_SOCKET,
        SO_ATTACH_FILTER,
        bytes(_FilterProgram(len(program) // 8, ctypes.addressof(instructions))),
    )


def syscall(what: str, number: int, *arguments: object) -> int:
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), what)


def set_filesystem_ids(uid: int, gid: int) -> None:
    """From here on this process creates and opens files as (uid, gid), without root's right to pass
    over permissions.
    """
    _libc.setfsgid(ctypes.c_uint(gid))
    _libc.setfsuid(ctypes.c_uint(uid))
    if _libc.setfsuid(ctypes.c_int(-1)) != uid:  # the call reports the previous value and no error
        raise OSError(errno.EPERM, f"setfsuid {uid} was refused")


def open_beneath(directory_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """openat2 that follows links only while they stay below directory_fd: `..`, absolute links and
    /proc magic links raise EXDEV.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
    for _ in range(100):
        try:
            return syscall(
                f"open {path}",
                SYS_OPENAT2,
                directory_fd,
                ctypes.c_char_p(os.fsencode(path)),
                ctypes.byref(how),
                ctypes.sizeof(how),
            )
        except OSError as error:
            if (
                error.errno != errno.EAGAIN
            ):  # EAGAIN: a rename raced with `..`; the kernel asks to try again
                raise
    raise OSError(errno.EXDEV, f"open {path}: the path kept changing")


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def write_file(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def children_of(pid: int) -> list[int]:
    """Direct children of a process, threads' children included."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return []
    found = []
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += [int(word) for word in file.read().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def descendants_of(roots: set[int]) -> set[int]:
    """These processes and all below them."""
    found, pending = set(roots), list(roots)
    while pending:
        fresh = [child for child in children_of(pending.pop()) if child not in found]
        found.update(fresh)
        pending += fresh
    return found


def kill_trees(find: Callable[[], set[int]]) -> None:
    """SIGKILL for the processes that `find` returns.

    They are stopped first, or they would fork while they are killed.
    """
    stopped: set[int] = set()
    while fresh := find() - stopped:
        for pid in fresh:
            signal_process(pid, signal.SIGSTOP)
        stopped |= fresh
    for pid in stopped:
        signal_process(pid, signal.SIGKILL)


def signal_process(pid: int, number: int) -> None:
    """Nothing happens if it is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_all_of(uid: int | None = None) -> None:
    """SIGKILL for every process of a sandbox's user id; without one, for all of the pid namespace
    that our children are in, but its init.
    """
    killer = os.fork()
    if killer == 0:
        try:
            if uid is not None:
                os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)  # all at one stroke, so a fork bomb cannot run away from it
        finally:
            os._exit(0)
    os.waitpid(killer, 0)


def lower_limit(kind: int, value: int) -> None:
    """Set an rlimit, soft and hard, unless it is lower already."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def restore_access(directory: str) -> None:
    """Give a directory back to its owner: after `chmod 0 .` no command could start, and a failure
    would look like ours.
    """
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    if mode & 0o700 != 0o700:
        os.chmod(directory, mode | 0o700)
