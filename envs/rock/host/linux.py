"""System calls that the standard library lacks, through ctypes, on x86_64 and aarch64.

Many are made between fork and exec, where each page that Python writes to is copied by a fault of
some microseconds. So their argument types are declared, and what they point to is made ahead: with
objects of ctypes made for each call, giving up capabilities took a millisecond instead of a fifth.
"""

import ctypes
import errno
import fcntl
import functools
import os
import platform
import resource
import select
import signal
import socket
import stat
import struct
from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)


def _declare(
    name: str, arguments: tuple[type, ...], result: type = ctypes.c_int
) -> Callable[..., int]:
    """Return a function of the C library.

    Where it has none of this name, as on a Mac that only asks for remote sandboxes, a call fails.
    """
    try:
        return ctypes.CFUNCTYPE(result, *arguments, use_errno=True)((name, _libc))
    except AttributeError:
        return functools.partial(_fail, name)


def _fail(name: str, *arguments: object) -> int:
    raise OSError(errno.ENOSYS, f"this system has no {name}, which sandboxes of Linux need")


_capset = _declare("capset", (ctypes.c_void_p, ctypes.c_void_p))
_mount = _declare("mount", (*3 * (ctypes.c_char_p,), ctypes.c_ulong, ctypes.c_char_p))
_prctl = _declare("prctl", (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, *2 * (ctypes.c_ulong,)))
_setfsgid = _declare("setfsgid", (ctypes.c_uint,))
_setfsuid = _declare("setfsuid", (ctypes.c_uint,))
_setns = _declare("setns", (ctypes.c_int, ctypes.c_int))
_umount2 = _declare("umount2", (ctypes.c_char_p, ctypes.c_int))
_unshare = _declare("unshare", (ctypes.c_int,))
_SYSCALL_ARGUMENTS = 5  # of the calls here, at most
# Each argument is an integer, a pointer or bytes, and as wide as a pointer.
_syscall = _declare(
    "syscall", (ctypes.c_long, *_SYSCALL_ARGUMENTS * (ctypes.c_void_p,)), ctypes.c_long
)

ARCHITECTURE = platform.machine()
# Descriptors that are handed to a new program lie from here on; a holder's own ones lie below.
FIRST_PASSED_FD = 80
# Limits of a thousand million exist, and programs that close all they could have open run for ages.
MAX_DESCRIPTORS = 1 << 20

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
# Flags of mount; the first four are mount_setattr's too.
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_SECUREBITS = 28
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
# System calls from 424 on have the same number on every architecture.
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_OPENAT2 = 437
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE = 444
SYS_LANDLOCK_ADD = 445
SYS_LANDLOCK_RESTRICT = 446
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(ARCHITECTURE, 0)
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_BENEATH = 0x08
SECBIT_NO_SETUID_FIXUP = 1 << 2  # a change of user ids keeps the capabilities
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
MNT_DETACH = 2
SECCOMP_MODE_FILTER = 2
WAIT_ALL = 0x40000000  # __WALL: also children that end without SIGCHLD
SIOCSIFFLAGS = 0x8914
SIOCOUTQ = 0x5411
IFF_UP = 1
SO_ATTACH_FILTER = 26
MAX_OPEN_ATTEMPTS = 100
RESERVED_ADDRESS_BYTES = 2 << 30
_BYTES_PER_INSTRUCTION = 8
_CAPABILITY_VERSION_3 = 0x20080522
_THIS_PROCESS = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
_NO_CAPABILITIES = (ctypes.c_uint32 * 6)()
_READ_BYTES = 1 << 16
_NO_ID = (1 << 32) - 1


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


class Filter:
    """A classic BPF program in the kernel's form.

    Attributes:
      structure: its struct sock_fprog, which is valid as long as this object lives.
      address: of the structure.
    """

    def __init__(self, program: bytes):
        self._instructions = ctypes.create_string_buffer(program, len(program))
        length = len(program) // _BYTES_PER_INSTRUCTION
        self.structure = _FilterProgram(length, ctypes.addressof(self._instructions))
        self.address = ctypes.addressof(self.structure)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Move this process into new namespaces (CLONE_NEW...)."""
    _check(_unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount a file system of type `kind`, or with None change or bind an existing mount."""
    result = _mount(
        os.fsencode(source),
        os.fsencode(target),
        None if kind is None else os.fsencode(kind),
        flags,
        None if data is None else os.fsencode(data),
    )
    _check(result, f"mount {source} on {target}")


def restrict_mount(path: str, flags: int, recursive: bool = False) -> None:
    """Add flags such as MS_RDONLY to a mount, and with `recursive` to all mounts below it."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    syscall(
        f"mount_setattr {path}",
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        os.fsencode(path),
        AT_RECURSIVE if recursive else 0,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
    )


def clone_mount(source: int | str) -> int:
    """Return a descriptor of a copy of a mount, which `attach_mount` puts somewhere.

    It is in no namespace yet, and may be put into one where the path leads elsewhere.

    Args:
      source: a path, for the mount there with all below it; or a descriptor, for the file or
        folder that it is of.
    """
    if isinstance(source, int):
        place, name, flags = source, b"", AT_EMPTY_PATH
    else:
        place, name, flags = AT_FDCWD, os.fsencode(source), AT_RECURSIVE
    mount = syscall(
        f"open_tree {source}",
        SYS_OPEN_TREE,
        place,
        name,
        flags | OPEN_TREE_CLONE | os.O_CLOEXEC,
    )
    os.set_inheritable(mount, False)
    return mount


def attach_mount(mount: int, path: str) -> None:
    """Put a mount of `clone_mount` at `path` and close its descriptor."""
    syscall(
        f"move_mount {path}",
        SYS_MOVE_MOUNT,
        mount,
        b"",
        AT_FDCWD,
        os.fsencode(path),
        MOVE_MOUNT_F_EMPTY_PATH,
    )
    os.close(mount)


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root of this mount namespace and move the old root to `old`."""
    syscall(
        "pivot_root",
        SYS_PIVOT_ROOT,
        os.fsencode(new),
        os.fsencode(old),
    )


def detach(path: str) -> None:
    """Take a mount and all below it out of sight, and unmount it when its last user is gone."""
    _check(_umount2(os.fsencode(path), MNT_DETACH), f"umount {path}")


def setns(descriptor: int, kind: int) -> None:
    """Move this thread into the namespace that a descriptor of /proc/PID/ns stands for."""
    _check(_setns(descriptor, kind), "setns")


def drop_bounding_set() -> None:
    """Keep every program that this process or its children execute from getting a capability."""
    last = int(read_file("/proc/sys/kernel/cap_last_cap"))
    for capability in range(last + 1):
        prctl(PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    """Drop all capabilities of this process for good."""
    _check(_capset(_THIS_PROCESS, _NO_CAPABILITIES), "capset")


def raise_loopback() -> None:
    """Set the loopback interface of a new network namespace up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def prctl(option: int, value: int, address: int = 0) -> None:
    """Change an attribute of this process (PR_...)."""
    _check(_prctl(option, value, address, 0, 0), f"prctl {option}")


def install_filter(program: Filter) -> None:
    """Load a seccomp filter (seccomp.build) into this process for good.

    This needs no_new_privs or root.
    """
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program.address)


def unread_bytes(sender: socket.socket) -> int:
    """Return the memory of what was sent on a unix socket and not received yet."""
    return struct.unpack("i", fcntl.ioctl(sender, SIOCOUTQ, b"\0" * 4))[0]


def attach_filter(receiver: socket.socket, program: Filter) -> None:
    """Let a socket receive only what a classic BPF program accepts."""
    receiver.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(program.structure))


def syscall(what: str, number: int, *arguments: object) -> int:
    """Make a system call by number; an OSError names `what`."""
    missing = _SYSCALL_ARGUMENTS - len(arguments)
    return _check(_syscall(number, *arguments, *missing * (0,)), what)


def set_filesystem_ids(uid: int, gid: int) -> None:
    """Create and open files from now on as (uid, gid), without root's special rights."""
    _setfsgid(gid)
    _setfsuid(uid)
    # The call reports the previous value and no error, so it is called again to see the effect.
    if _setfsuid(_NO_ID) != uid:
        raise OSError(errno.EPERM, f"setfsuid {uid} was refused")


def open_beneath(directory_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open a path below a directory and follow only links that stay below it.

    Raises:
      OSError: EXDEV for `..` that leaves it, absolute links and /proc's magic links; and as open.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
    for _ in range(MAX_OPEN_ATTEMPTS):
        try:
            return syscall(
                f"open {path}",
                SYS_OPENAT2,
                directory_fd,
                os.fsencode(path),
                ctypes.byref(how),
                ctypes.sizeof(how),
            )
        except OSError as error:
            # EAGAIN: a rename raced with `..`, and the kernel asks to try again.
            if error.errno != errno.EAGAIN:
                raise
    raise OSError(errno.EXDEV, f"open {path}: the path kept changing")


def read_file(path: str) -> bytes:
    """Return a file's content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_all(descriptor)
    finally:
        os.close(descriptor)


def read_all(descriptor: int) -> bytes:
    """Return what can be read until the end."""
    content = b""
    while piece := os.read(descriptor, _READ_BYTES):
        content += piece
    return content


def write_file(path: str, content: bytes) -> None:
    """Write a file, or a setting of the kernel."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        while True:  # once also where there is nothing to write
            content = content[os.write(descriptor, content) :]
            if not content:
                return
    finally:
        os.close(descriptor)


def is_running(pid: int) -> bool:
    """Return whether there is such a process and it has not ended, collected or not."""
    try:
        status = read_file(f"/proc/{pid}/stat")
    except OSError:
        return False
    _, _, rest = status.rpartition(b")")  # its name may hold anything
    return rest.split()[0] not in (b"Z", b"X")


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process, those of all its threads."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return []
    found: list[int] = []
    for thread in threads:
        try:
            words = read_file(f"/proc/{pid}/task/{thread}/children").split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += map(int, words)
    return found


def descendants_of(roots: set[int]) -> set[int]:
    """Return these processes and all below them."""
    found = set(roots)
    pending = list(roots)
    while pending:
        fresh = [child for child in children_of(pending.pop()) if child not in found]
        found.update(fresh)
        pending += fresh
    return found


def kill_trees(find: Callable[[], set[int]]) -> None:
    """Kill the processes that `find` returns.

    They are stopped first: otherwise they could fork while they are killed.
    """
    stopped: set[int] = set()
    while fresh := find() - stopped:
        for pid in fresh:
            signal_process(pid, signal.SIGSTOP)
        stopped |= fresh
    for pid in stopped:
        signal_process(pid, signal.SIGKILL)


def signal_process(pid: int, number: int) -> None:
    """Send a signal to a process; do nothing if it is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def collect(pid: int) -> bool:
    """Collect a child if it has ended, whatever signal it ends with; return whether it is gone."""
    try:
        ended, _ = os.waitpid(pid, os.WNOHANG | WAIT_ALL)
    except ChildProcessError:
        return True
    return ended == pid


def kill_all_of(uid: int | None = None) -> None:
    """Kill every process of a user id; with None, those of our children's pid namespace.

    One call kills all at once, so a fork bomb cannot outrun it.
    """
    killer = os.fork()
    if killer == 0:
        try:
            if uid is not None:
                os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(killer, 0)


def wait_readable(descriptor: int, seconds: float) -> bool:
    """Wait until a descriptor of any number can be read or has ended; False after `seconds`."""
    poller = select.poll()  # select() takes no descriptor above 1,023
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(int(1000 * seconds)))


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, at most MAX_DESCRIPTORS; return it.

    Programs that this process starts inherit it; a limit that is higher already stays.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def lower_limit(kind: int, value: int) -> None:
    """Set an rlimit, soft and hard, unless it is lower already."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def limit_memory(memory_bytes: int) -> None:
    """Limit the memory of this process and of each one that it starts."""
    lower_limit(resource.RLIMIT_DATA, memory_bytes)
    # Wider, since threads and runtimes reserve address space that they never touch.
    lower_limit(resource.RLIMIT_AS, memory_bytes + RESERVED_ADDRESS_BYTES)


def restore_access(directory: str) -> None:
    """Give a directory's owner all rights to it.

    After an agent's `chmod 0 .` no command could start, which would look like our failure.
    """
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    if mode & 0o700 != 0o700:
        os.chmod(directory, mode | 0o700)
