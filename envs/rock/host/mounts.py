"""The mounts of the namespaces tier: what a sandbox's commands see instead of the host's files.

/            read-only: /usr and its links, a few files of /etc, fresh /proc and /dev
/workspace   and /tmp: in one tmpfs with limited bytes and inodes; a sandbox that starts from a
             snapshot has them in an overlay of the snapshot and that tmpfs
"""

import os

from . import linux
from .tree import copy_tree

# In the holder's own mount namespace: the sandbox's /, the tmpfs, and its writable directories.
ROOT = "/tmp/root"
DISK = "/tmp/disk"
TREE = "/tmp/tree"
TOOLS = "/tmp/tools"  # a verifier's; no other view of the sandbox has them
SHM_BYTES = 16 << 20
SHM_INODES = 1024
TERMINALS = 32  # at most, of the 3,072 that all sandboxes of a host have together
# At most; a sandbox's own table of limits bounds what it takes from the host's of its user.
WATCHERS = 16
WATCHED_FILES = 4096
OWN_INODES = 8  # of the tmpfs: its root, the two directories, what an overlay needs
HIDDEN_BYTES = 64 << 20  # room for a verifier's files
REPOSITORY = os.path.realpath(f"{os.path.dirname(__file__)}/../../..")
SAFE = linux.MS_NOSUID | linux.MS_NODEV

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ROOT_DIRECTORIES = ("usr", "etc", "proc", "dev", "tmp", "workspace", "run")
_PROGRAM_DIRECTORIES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_SETTINGS = {
    "passwd": "root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n"
    "agent:x:1000:1000::/workspace:/bin/bash\n"
    "nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "timezone": "Etc/UTC\n",
    "resolv.conf": "nameserver 127.0.0.1\noptions timeout:2 attempts:2\n",
}
_ZONE = "/usr/share/zoneinfo/Etc/UTC"  # where it is missing, programs take UTC as well
_COPIED_SETTINGS = ("ld.so.cache", "nsswitch.conf", "magic")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
# Of /proc: made read-only, whatever their permissions say.
_KERNEL_SETTINGS = ("sys", "sysrq-trigger", "irq", "bus")


def build_tree(disk_bytes: int, inodes: int, snapshot: str | None, has_tools: bool) -> None:
    """Mount what will be the sandbox's / at ROOT and its writable part at TREE.

    Args:
      disk_bytes: limit of the writable part.
      inodes: limit of the writable part.
      snapshot: directory of the files to start from.
      has_tools: whether the current directory is that of a verifier's tools.
    """
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    # Opened first: it may lie in /tmp, which is covered next.
    lower = os.open(snapshot, _DIRECTORY) if snapshot else None
    linux.mount("tmpfs", "/tmp", "tmpfs", SAFE, "size=1m,nr_inodes=1k,mode=0755")
    for directory in (DISK, TREE, ROOT):
        os.mkdir(directory)
    for name in _ROOT_DIRECTORIES:
        os.mkdir(f"{ROOT}/{name}")
    if has_tools:
        os.mkdir(TOOLS)
        linux.mount(".", TOOLS, None, linux.MS_BIND | linux.MS_REC)
    limits = f"size={disk_bytes},nr_inodes={inodes + OWN_INODES},mode=0755"
    linux.mount("tmpfs", DISK, "tmpfs", SAFE, limits)
    if lower is None:
        _make_writable_part()
    else:
        stack(lower, DISK, TREE)
        os.close(lower)
    _mount_programs()
    _write_settings(f"{ROOT}/etc")


def _make_writable_part() -> None:
    os.mkdir(f"{DISK}/workspace", 0o755)
    os.mkdir(f"{DISK}/tmp")
    os.chmod(f"{DISK}/tmp", 0o1777)
    linux.mount(DISK, TREE, None, linux.MS_BIND)


def _mount_programs() -> None:
    _mount_from_host("/usr", f"{ROOT}/usr")
    for name in _PROGRAM_DIRECTORIES:
        outer = f"/{name}"
        inner = f"{ROOT}/{name}"
        if os.path.islink(outer):
            os.symlink(os.readlink(outer), inner)
        elif os.path.isdir(outer):
            os.mkdir(inner)
            _mount_from_host(outer, inner)
    if REPOSITORY.startswith("/usr/"):  # it holds verifiers and task generators
        cover = f"{ROOT}{REPOSITORY}"
        linux.mount("tmpfs", cover, "tmpfs", SAFE | linux.MS_RDONLY, "size=4k,mode=0755")


def _mount_from_host(outer: str, inner: str) -> None:
    """Mount a directory of the host's programs, read-only in the end.

    It is an overlay, so that its files are the sandbox's own to lock and to watch: nobody waits for
    another's lock, and watching tells nothing of what others start. Where other file systems are
    mounted below the directory, which no overlay shows, or the kernel refuses, it is the directory
    itself.
    """
    if not _has_mounts_below(outer):
        try:
            # A second, empty layer: without a writable one the kernel wants two.
            layers = f"lowerdir={outer}:{ROOT}/run"
            linux.mount("overlay", inner, "overlay", SAFE | linux.MS_RDONLY, layers)
            return
        except OSError:
            pass  # before 5.11, or a security module forbids it
    linux.mount(outer, inner, None, linux.MS_BIND | linux.MS_REC)


def _has_mounts_below(directory: str) -> bool:
    with open("/proc/self/mountinfo") as file:
        return any(line.split(" ", 5)[4].startswith(f"{directory}/") for line in file)


def stack(lower: int, disk: str, place: str) -> None:
    """Mount at `place` a directory, and above it what is written, which lies on `disk`.

    It is an overlay; a copy where the kernel cannot make one (before 6.6 a tmpfs has no user
    attributes).

    Args:
      lower: descriptor of the directory.
      disk: a writable directory for what the overlay needs.
      place: the mount point.
    """
    upper = f"{disk}/upper"
    work = f"{disk}/work"
    os.mkdir(upper, 0o755)
    os.mkdir(work)
    layers = f"lowerdir=/proc/self/fd/{lower},upperdir={upper},workdir={work},userxattr"
    try:
        linux.mount("overlay", place, "overlay", SAFE, layers)
    except OSError:
        linux.mount(upper, place, None, linux.MS_BIND)
        target = os.open(place, _DIRECTORY)
        copy_tree(lower, target)
        os.close(target)


def used_inodes() -> int:
    """Return how many inodes of the writable part are in use."""
    status = os.statvfs(DISK)
    return status.f_files - status.f_ffree


def _write_settings(etc: str) -> None:
    for name, text in _SETTINGS.items():
        linux.write_file(f"{etc}/{name}", text.encode())
    for name in _COPIED_SETTINGS:
        if os.path.isfile(f"/etc/{name}"):
            linux.write_file(f"{etc}/{name}", linux.read_file(f"/etc/{name}"))
    os.symlink(_ZONE, f"{etc}/localtime")  # not the host's: dates must not depend on the machine
    if os.path.isdir("/etc/alternatives"):  # Debian's awk, vi, java, ... are links through it
        os.mkdir(f"{etc}/alternatives")
        linux.mount("/etc/alternatives", f"{etc}/alternatives", None, linux.MS_BIND)


def enter_view() -> None:
    """Make a second mount namespace whose root is ROOT, with nothing of the host beneath it."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(ROOT, ROOT, None, linux.MS_BIND | linux.MS_REC)
    linux.restrict_mount(ROOT, linux.MS_RDONLY | SAFE, recursive=True)
    linux.mount("proc", f"{ROOT}/proc", "proc", SAFE | linux.MS_NOEXEC)
    limits = f"{ROOT}/proc/sys/user"
    linux.write_file(f"{limits}/max_user_namespaces", b"0")
    linux.write_file(f"{limits}/max_inotify_instances", str(WATCHERS).encode())
    linux.write_file(f"{limits}/max_inotify_watches", str(WATCHED_FILES).encode())
    for name in _KERNEL_SETTINGS:
        path = f"{ROOT}/proc/{name}"
        if os.path.exists(path):
            linux.mount(path, path, None, linux.MS_BIND | linux.MS_REC)
            linux.restrict_mount(path, linux.MS_RDONLY, recursive=True)
    _make_devices(f"{ROOT}/dev")
    for name in ("workspace", "tmp"):
        linux.mount(f"{TREE}/{name}", f"{ROOT}/{name}", None, linux.MS_BIND)
    os.chdir(ROOT)
    linux.pivot_root(".", ".")
    linux.detach(".")  # the old root lay over the new one
    os.chdir("/")


def _make_devices(dev: str) -> None:
    linux.mount("tmpfs", dev, "tmpfs", linux.MS_NOSUID, "size=64k,mode=0755")
    for name in _DEVICES:
        device = f"{dev}/{name}"
        os.close(os.open(device, os.O_CREAT | os.O_WRONLY, 0o666))
        linux.mount(f"/dev/{name}", device, None, linux.MS_BIND)
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"{dev}/{name}")
    for name in ("shm", "pts"):
        os.mkdir(f"{dev}/{name}")
    terminals = f"newinstance,ptmxmode=0666,mode=620,max={TERMINALS}"
    no_programs = linux.MS_NOSUID | linux.MS_NOEXEC
    linux.mount("devpts", f"{dev}/pts", "devpts", no_programs, terminals)
    mount_shared_memory(f"{dev}/shm")
    linux.restrict_mount(dev, linux.MS_RDONLY)


def mount_shared_memory(place: str) -> None:
    """Mount an empty file system for POSIX shared memory and semaphores."""
    limits = f"size={SHM_BYTES},nr_inodes={SHM_INODES},mode=1777"
    linux.mount("tmpfs", place, "tmpfs", SAFE, limits)


def empty_shared_memory() -> None:
    """Let the files in /dev/shm end, in the sandbox's view and while none of its commands runs.

    They have no process any more and still take the sandbox's memory.
    """
    status = os.statvfs("/dev/shm")
    own = 1  # its root
    if status.f_files - status.f_ffree > own:
        linux.detach("/dev/shm")
        mount_shared_memory("/dev/shm")


def mount_verifier_places(disk_bytes: int) -> None:
    """Mount an empty /tmp and shared memory of a verifier, and /run for its files."""
    linux.mount("tmpfs", "/tmp", "tmpfs", SAFE, f"size={disk_bytes},mode=1777")
    mount_shared_memory("/dev/shm")
    hidden = f"size={HIDDEN_BYTES},nr_inodes=1k,mode=0755"
    linux.mount("tmpfs", "/run", "tmpfs", SAFE, hidden)


def cover_workspace(workspace: str, disk_bytes: int, inodes: int) -> None:
    """Let what is written in the workspace from now on end with this mount namespace.

    It lies in a file system of its own above the workspace's files.
    """
    os.mkdir("/run/view")
    limits = f"size={disk_bytes},nr_inodes={inodes + OWN_INODES},mode=0755"
    linux.mount("tmpfs", "/run/view", "tmpfs", SAFE, limits)
    below = os.open(workspace, _DIRECTORY)
    stack(below, "/run/view", workspace)
    os.close(below)
    linux.detach("/run/view")
    os.rmdir("/run/view")
    os.chdir(workspace)
