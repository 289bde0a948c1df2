"""Landlock: the file-system fence of the tier that needs no namespaces. ABI 1 (Linux 5.13) to 7.

Read and execute below the system's program directories, everything below the workspace, a few
devices; nothing else opens.
"""

import ctypes
import os

from . import linux

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_MAKE_DEVICES = (1 << 6) | (1 << 11)
_NET_BIND_TCP, _NET_CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_UNIX, _SCOPE_SIGNAL = 1, 2
_RULE_PATH_BENEATH, _VERSION_FLAG = 1, 1

PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SETTINGS = (
    "/etc/ld.so.cache",
    "/etc/nsswitch.conf",
    "/etc/localtime",
    "/etc/alternatives",
    "/etc/passwd",
    "/etc/group",
    "/etc/magic",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def abi() -> int:
    """The kernel's Landlock version; 0 where it has none or hides it."""
    try:
        return linux.syscall(
            "landlock version", linux.SYS_LANDLOCK_CREATE, ctypes.c_void_p(0), 0, _VERSION_FLAG
        )
    except OSError:
        return 0


def _file_rights(version: int) -> int:
    """Every file-system right that this version knows.

    A right not handled would stay allowed everywhere.
    """
    newest = {1: 12, 2: 13, 3: 14, 4: 14}.get(version, 15)
    return (1 << (newest + 1)) - 1


def ruleset(writable: tuple[str, ...], readable: tuple[str, ...]) -> int:
    """A descriptor for `restrict`.

    Below the writable directories everything is allowed but making devices.
    """
    version = abi()
    if version < 1:
        raise OSError("this kernel offers no Landlock")
    handled = _file_rights(version)
    attributes = _Ruleset(
        handled,
        _NET_BIND_TCP | _NET_CONNECT_TCP if version >= 4 else 0,
        _SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL if version >= 6 else 0,
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    descriptor = linux.syscall(
        "landlock ruleset", linux.SYS_LANDLOCK_CREATE, ctypes.byref(attributes), size, 0
    )
    os.set_inheritable(descriptor, False)
    read = _EXECUTE | _READ_FILE | _READ_DIR
    for path in PROGRAMS + SETTINGS + readable:
        _allow(descriptor, path, read & handled)
    for path in DEVICES:
        _allow(descriptor, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV) & handled)
    for path in writable:
        _allow(descriptor, path, handled & ~_MAKE_DEVICES)
    return descriptor


def _allow(descriptor: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # what this system does not have cannot be read either
    try:
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = _PathBeneath(rights, parent)
        linux.syscall(
            f"landlock rule for {path}",
            linux.SYS_LANDLOCK_ADD,
            descriptor,
            _RULE_PATH_BENEATH,
            ctypes.byref(rule),
            0,
        )
    finally:
        os.close(parent)


def restrict(descriptor: int) -> None:
    """Fence the calling process and all it will start. Needs no_new_privs or root."""
    linux.syscall("landlock restrict", linux.SYS_LANDLOCK_RESTRICT, descriptor, 0)
