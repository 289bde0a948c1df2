"""Landlock: the file-system rules of the tier that needs no namespaces.

Programs read and execute below the system's program directories, do everything below the workspace,
and use a few devices; nothing else opens. ABI versions 1 (Linux 5.13) to 7 are supported.
"""

import ctypes
import os

from . import linux

FIRST_ABI_WITH_NETWORK = 4
FIRST_ABI_WITH_SCOPES = 6
_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_MAKE_CHAR = 1 << 6
_MAKE_BLOCK = 1 << 11
_TRUNCATE = 1 << 14
_IOCTL_DEV = 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_USE_DEVICE = _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NET_BIND_TCP = 1
_NET_CONNECT_TCP = 2
_SCOPE_ABSTRACT_UNIX = 1
_SCOPE_SIGNAL = 2
_RULE_PATH_BENEATH = 1
_VERSION_FLAG = 1
# The last right that each ABI version knows, as a bit number.
_NEWEST_RIGHT = {1: 12, 2: 13, 3: 14, 4: 14}
_NEWEST_RIGHT_FROM_ABI_5 = 15

PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SETTINGS = (
    "/etc/ld.so.cache",
    "/etc/nsswitch.conf",
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
    """Return the kernel's Landlock version; 0 where it has none or hides it."""
    try:
        return linux.syscall("landlock version", linux.SYS_LANDLOCK_CREATE, 0, 0, _VERSION_FLAG)
    except OSError:
        return 0


def _file_rights(version: int) -> int:
    """Return every file-system right that this version knows.

    A right that is not handled would stay allowed everywhere.
    """
    newest = _NEWEST_RIGHT.get(version, _NEWEST_RIGHT_FROM_ABI_5)
    return (1 << (newest + 1)) - 1


def ruleset(writable: tuple[str, ...], readable: tuple[str, ...]) -> int:
    """Return the descriptor of a ruleset, for `restrict`.

    Args:
      writable: directories below which everything is allowed but making devices.
      readable: paths below which files are read and executed, beside PROGRAMS and SETTINGS.

    Raises:
      OSError: the kernel has no Landlock.
    """
    version = abi()
    if version < 1:
        raise OSError("this kernel offers no Landlock")
    handled = _file_rights(version)
    network = 0
    scopes = 0
    size = 8  # of struct landlock_ruleset_attr, as this version knows it
    if version >= FIRST_ABI_WITH_NETWORK:
        network = _NET_BIND_TCP | _NET_CONNECT_TCP
        size = 16
    if version >= FIRST_ABI_WITH_SCOPES:
        scopes = _SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL
        size = 24
    attributes = _Ruleset(handled, network, scopes)
    descriptor = linux.syscall(
        "landlock ruleset", linux.SYS_LANDLOCK_CREATE, ctypes.byref(attributes), size, 0
    )
    os.set_inheritable(descriptor, False)
    for path in PROGRAMS + SETTINGS + readable:
        _allow(descriptor, path, _READ & handled)
    for path in DEVICES:
        _allow(descriptor, path, _USE_DEVICE & handled)
    for path in writable:
        _allow(descriptor, path, handled & ~(_MAKE_CHAR | _MAKE_BLOCK))
    return descriptor


def _allow(descriptor: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # this system does not have it
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
    """Apply a ruleset to this process and all that it starts; needs no_new_privs or root."""
    linux.syscall("landlock restrict", linux.SYS_LANDLOCK_RESTRICT, descriptor, 0)
