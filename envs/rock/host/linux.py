"""The few system calls that the standard library lacks, through ctypes. Linux on x86_64 and aarch64."""

import ctypes
import errno
import os
import platform
import resource
import signal
import stat

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SYS_OPENAT2, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 437, 444, 445, 446  # one number on every architecture
RESOLVE_NO_MAGICLINKS, RESOLVE_BENEATH = 0x02, 0x08

FIRST_PASSED_FD = 32  # descriptors handed to a new program lie from here on; a holder's own ones, some twenty, below
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
    result = _libc.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data))
    _check(result, f"mount {source} on {target}")


def prctl(option: int, value: int, pointer: object = None) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), pointer if pointer is not None else zero, zero, zero), f"prctl {option}")


def install_filter(program: bytes) -> None:
    """Load a seccomp filter (seccomp.build) into this process, for good. Needs no_new_privs or root."""
    instructions = ctypes.create_string_buffer(program, len(program))
    prctl(PR_SET_SECCOMP, 2, ctypes.byref(_FilterProgram(len(program) // 8, ctypes.addressof(instructions))))


def syscall(what: str, number: int, *arguments: object) -> int:
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), what)


def set_filesystem_ids(uid: int, gid: int) -> None:
    """From here on this process creates and opens files as (uid, gid), without root's right to pass over permissions."""
    _libc.setfsgid(ctypes.c_uint(gid))
    _libc.setfsuid(ctypes.c_uint(uid))
    if _libc.setfsuid(ctypes.c_int(-1)) != uid:  # the call reports the previous value and no error
        raise OSError(errno.EPERM, f"setfsuid {uid} was refused")


def open_beneath(directory_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """openat2 that follows links only while they stay below directory_fd: `..`, absolute links and /proc magic links raise EXDEV."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
    for _ in range(100):
        try:
            return syscall(f"open {path}", SYS_OPENAT2, directory_fd, ctypes.c_char_p(os.fsencode(path)), ctypes.byref(how),
                           ctypes.sizeof(how))
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: a rename raced with `..`; the kernel asks to try again
                raise
    raise OSError(errno.EXDEV, f"open {path}: the path kept changing")


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


def kill_all_of(uid: int) -> None:
    """SIGKILL for every process of a sandbox's user id."""
    killer = os.fork()
    if killer == 0:
        try:
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


# Python ignores these for itself, and a new program would inherit that: `yes | head` would never end.
RESTORED_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)


def spawn(arguments: list[str], environment: dict, out: int, err: int, passed: list[int]) -> int:
    """Start a program with /dev/null as input and `passed` at FIRST_PASSED_FD and on; every other descriptor is closed there."""
    moves = [(os.POSIX_SPAWN_DUP2, source, FIRST_PASSED_FD + place) for place, source in enumerate(passed)]
    moves += [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, err, 2)]
    return os.posix_spawn(arguments[0], arguments, environment, file_actions=moves, setsigdef=RESTORED_SIGNALS)


def restore_access(directory: str) -> None:
    """Give a directory back to its owner: after `chmod 0 .` no command could start, and a failure would look like ours."""
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    if mode & 0o700 != 0o700:
        os.chmod(directory, mode | 0o700)
