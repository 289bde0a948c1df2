"""The namespaces tier, inside a holder: a private machine made once, and a fork of the holder for
each command.

    holder      has all capabilities in user, mount, network, IPC, UTS and cgroup namespaces of its own, none outside them
      init      process 1 of the sandbox's pid namespace: makes the mounts that commands see, then becomes a program that only waits
      command   joins the sandbox's cgroups and mounts, loses every capability, has its system calls filtered, and is executed

The kernel knows all three by an id that owns nothing on the host. Commands see

    /            read-only: /usr and its links, a few files of /etc, fresh /proc and /dev
    /workspace   and /tmp, which lie in one tmpfs that is limited in bytes and inodes; started from a snapshot, in an overlay of that on it
"""

import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable

from . import egress, linux, seccomp
from .process import Started, start
from .tree import copy_tree

ROOT, DISK, TREE = "/tmp/root", "/tmp/disk", "/tmp/tree"  # in the holder's own mount namespace
INNER_ID = 1000
SHM_BYTES = 16 << 20
OWN_INODES = 8  # of the tmpfs: its root, the two directories, what an overlay needs
HIDDEN_BYTES = 64 << 20  # room for a verifier's files
START_SECONDS = 10.0
KILL_SECONDS = 10.0
REPOSITORY = os.path.realpath(f"{os.path.dirname(__file__)}/../../..")

_NAMESPACES = (
    linux.CLONE_NEWUSER
    | linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
)
_SAFE = linux.MS_NOSUID | linux.MS_NODEV
_PASSWD = """root:x:0:0:root:/nonexistent:/usr/sbin/nologin
agent:x:1000:1000::/workspace:/bin/bash
nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin
"""
_GROUP = "root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n"
_HOSTS = "127.0.0.1 localhost sandbox\n::1 localhost\n"
_RESOLVER = "nameserver 127.0.0.1\noptions timeout:2 attempts:2\n"
_COPIED_SETTINGS = ("ld.so.cache", "nsswitch.conf", "magic")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
_KERNEL_SETTINGS = (
    "sys",
    "sysrq-trigger",
    "irq",
    "bus",
)  # of /proc: read-only, whatever their permissions say


class Mapping:
    """Only a process outside a new user namespace may map an id that is not its own: the zygote
    does it for its holder.
    """

    def __init__(self):
        self._unshared, self._mapped = os.pipe(), os.pipe()

    def descriptors(self) -> tuple[int, ...]:
        return (*self._unshared, *self._mapped)

    def wait(self) -> None:
        """In the holder, after unshare."""
        os.write(self._unshared[1], b"u")
        os.close(self._mapped[1])  # else a dead zygote would leave us waiting
        if not os.read(self._mapped[0], 1):
            raise OSError("the user namespace's id map could not be written")
        for descriptor in (*self._unshared, self._mapped[0]):
            os.close(descriptor)

    def serve(self, pid: int, uid: int, gid: int) -> None:
        """In the zygote, after fork: map INNER_ID to (uid, gid) outside.

        A holder that failed before is noticed by its silence.
        """
        os.close(self._unshared[1])
        try:
            if select.select([self._unshared[0]], [], [], START_SECONDS)[0] and os.read(
                self._unshared[0], 1
            ):
                if os.geteuid() != 0:
                    linux.write_file(f"/proc/{pid}/setgroups", b"deny")
                linux.write_file(f"/proc/{pid}/gid_map", f"{INNER_ID} {gid} 1\n".encode())
                linux.write_file(f"/proc/{pid}/uid_map", f"{INNER_ID} {uid} 1\n".encode())
                os.write(self._mapped[1], b"m")
        except OSError:
            pass  # the holder finds the pipe closed and reports it
        finally:
            for descriptor in (self._unshared[0], *self._mapped):
                os.close(descriptor)


class Tier:
    """How a holder works in this tier; fenced.Tier is its twin."""

    watches_disk = False  # the tmpfs itself enforces the limits
    workspace = "/workspace"

    def __init__(self, spec: dict, cgroup_entries: list[int]):
        self._spec = spec
        self._cgroup_entries = cgroup_entries
        self._filter = seccomp.build(linux.ARCHITECTURE, network=True)

    def set_up(self) -> int:
        """Enter the namespaces, build the tree and start init; returns a descriptor of the
        workspace.
        """
        _enter_namespaces(self._spec["mapping"])
        self.guard = egress.Guard([egress.Grant(*fields) for fields in self._spec["egress"]])
        _build_tree(self._spec["disk_bytes"], self._spec["inodes"], self._spec["snapshot"])
        self._first_inodes = _inodes()
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        # a program can never get a capability; the holder keeps those it has
        linux.drop_bounding_set()
        self._start_init()
        return os.open(f"{TREE}/workspace", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _start_init(self) -> None:
        self._lifeline, theirs = socket.socketpair()  # init ends when our end closes
        self._init = os.fork()
        if self._init == 0:
            _be_init(theirs, self._spec["waiting_program"])
        theirs.close()
        self._lifeline.settimeout(START_SECONDS)
        said, descriptors, _, _ = socket.recv_fds(self._lifeline, 4096, 1)
        if not descriptors:
            raise OSError(
                said.decode(errors="replace") or "the sandbox's init ended before it began"
            )
        self._mounts = descriptors[0]
        os.set_inheritable(self._mounts, False)

    def start_agent(
        self,
        arguments: list[str],
        environment: dict,
        out: int,
        err: int,
        prepare: Callable[[], None] = lambda: None,
    ) -> Started:
        def become() -> None:
            prepare()
            self._enter()
            self._execute(arguments[0], arguments, environment)

        return self._start(become, out, err)

    def start_verifier(
        self,
        script: int,
        files: dict[str, bytes],
        environment: dict,
        out: int,
        err: int,
        keep: bool,
    ) -> Started:
        """The grader: a view of the workspace that nobody sees but it, its own empty /tmp, shared
        memory and IPC, its files in /run/verifier, and a bash that its children cannot look into.

        That bash is execute-only, so the kernel marks the process undumpable: what the verifier
        runs (the agent's program, say) cannot read its memory, environment or descriptors through
        /proc. The script is a descriptor, never a file.
        """

        def become() -> None:
            self._enter()
            linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
            for place, options in (
                ("/tmp", f"size={self._spec['disk_bytes']},mode=1777"),
                ("/dev/shm", f"size={SHM_BYTES},mode=1777"),
                ("/run", f"size={HIDDEN_BYTES},nr_inodes=1k,mode=0755"),
            ):
                linux.mount("tmpfs", place, "tmpfs", _SAFE, options)
            if not keep:
                self._cover_workspace()
            os.mkdir("/run/verifier")
            for name, content in files.items():
                linux.write_file(f"/run/verifier/{name}", content)
            linux.restrict_mount("/run", linux.MS_RDONLY)
            os.dup2(script, linux.FIRST_PASSED_FD)
            os.set_inheritable(linux.FIRST_PASSED_FD, True)
            bash = self._spec["verifier_bash"]
            self._execute(
                bash,
                ["bash", f"/proc/self/fd/{linux.FIRST_PASSED_FD}"],
                environment | {"VERIFIER_FILES": "/run/verifier"},
            )

        return self._start(become, out, err)

    def _cover_workspace(self) -> None:
        """In a verifier's own mounts: what is written in /workspace from here on lies in a file
        system of its own, which ends with them.
        """
        os.mkdir("/run/view")
        linux.mount(
            "tmpfs",
            "/run/view",
            "tmpfs",
            _SAFE,
            f"size={self._spec['disk_bytes']},nr_inodes={self._spec['inodes'] + OWN_INODES},mode=0755",
        )
        below = os.open(self.workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _stack(below, "/run/view", self.workspace)
        os.close(below)
        linux.detach("/run/view")
        os.rmdir("/run/view")
        os.chdir(self.workspace)

    def _start(self, become: Callable[[], None], out: int, err: int) -> Started:
        for directory in ("workspace", "tmp"):
            linux.restore_access(f"{TREE}/{directory}")
        return start(become, self._cgroup_entries, out, err)

    def _enter(self) -> None:
        """From the holder's mounts into those of the sandbox."""
        linux.setns(self._mounts, linux.CLONE_NEWNS)
        os.chdir(self.workspace)

    def _execute(self, program: str | int, arguments: list[str], environment: dict) -> None:
        # Counted inside this sandbox's own user namespace, so siblings do not eat each other's
        # share. Set here and not in the holder, whose forks must not fail when a bomb has filled
        # it.
        linux.lower_limit(resource.RLIMIT_NPROC, self._spec["pids"] + 2)  # the holder and init
        linux.drop_capabilities()
        linux.install_filter(self._filter)
        os.execve(program, arguments, environment)

    def finished(self) -> None:
        """A command ended; nothing of it is kept."""

    def kill_leftovers(self) -> int:
        """Kill what a command left, and wait until it is gone; returns how many resisted.

        Whoever lost its parent in the pid namespace is a child of init, which collects the dead
        without being asked.
        """
        deadline = time.monotonic() + KILL_SECONDS
        while left := linux.children_of(self._init):
            if time.monotonic() > deadline:
                return len(left)
            linux.kill_all_of()
            time.sleep(0.0005)
        return 0

    def usage(self) -> tuple[int, int]:
        """(bytes, inodes) of the workspace and /tmp."""
        status = os.statvfs(DISK)
        return (status.f_blocks - status.f_bfree) * status.f_frsize, _inodes() - self._first_inodes

    def copy_to(self, target: int) -> None:
        """Copy workspace and /tmp into a directory."""
        source = os.open(TREE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            copy_tree(source, target)
        finally:
            os.close(source)

    def close(self) -> None:
        """End init, and with it whatever is left."""
        self._lifeline.close()
        os.waitpid(self._init, 0)

    def as_owner(self) -> "_Already":
        """Files are made under the right id already."""
        return _Already()


class _Already:
    def __enter__(self) -> None:
        """Nothing to change."""

    def __exit__(self, *_: object) -> None:
        """Nothing to change back."""


def _enter_namespaces(mapping: Mapping) -> None:
    """New namespaces in which this process has every capability, while the kernel knows it by an id
    that owns nothing.

    As real root the namespace is made first and the id dropped after it: systems that restrict user
    namespaces of ordinary ids allow that, and no process of a sandbox ever runs with the kernel's
    id 0 (which could write /proc/sys).
    """
    if os.geteuid() == 0:
        os.setgroups([])
    linux.unshare(_NAMESPACES)  # the pid namespace begins with the next fork
    mapping.wait()
    os.setresgid(INNER_ID, INNER_ID, INNER_ID)
    os.setresuid(INNER_ID, INNER_ID, INNER_ID)
    socket.sethostname("sandbox")
    linux.raise_loopback()


def _build_tree(disk_bytes: int, inodes: int, snapshot: str | None) -> None:
    """Mount what will be the sandbox's / below ROOT and its writable part at TREE."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    lower = (
        os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if snapshot else None
    )  # it may lie in /tmp
    linux.mount("tmpfs", "/tmp", "tmpfs", _SAFE, "size=1m,nr_inodes=1k,mode=0755")
    for directory in (
        DISK,
        TREE,
        ROOT,
        *(f"{ROOT}/{name}" for name in ("usr", "etc", "proc", "dev", "tmp", "workspace", "run")),
    ):
        os.mkdir(directory)
    linux.mount(
        "tmpfs",
        DISK,
        "tmpfs",
        _SAFE,
        f"size={disk_bytes},nr_inodes={inodes + OWN_INODES},mode=0755",
    )
    if lower is None:
        _make_writable_part()
    else:
        _stack(lower, DISK, TREE)
        os.close(lower)
    linux.mount("/usr", f"{ROOT}/usr", None, linux.MS_BIND | linux.MS_REC)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{ROOT}/{name}")
        elif os.path.isdir(f"/{name}"):
            os.mkdir(f"{ROOT}/{name}")
            linux.mount(f"/{name}", f"{ROOT}/{name}", None, linux.MS_BIND | linux.MS_REC)
    if REPOSITORY.startswith("/usr/"):  # verifiers and task generators lie there
        linux.mount(
            "tmpfs", f"{ROOT}{REPOSITORY}", "tmpfs", _SAFE | linux.MS_RDONLY, "size=4k,mode=0755"
        )
    _write_settings(f"{ROOT}/etc")


def _make_writable_part() -> None:
    os.mkdir(f"{DISK}/workspace", 0o755)
    os.mkdir(f"{DISK}/tmp")
    os.chmod(f"{DISK}/tmp", 0o1777)
    linux.mount(DISK, TREE, None, linux.MS_BIND)


def _stack(lower: int, disk: str, place: str) -> None:
    """Mount at `place` an overlay of a directory and what is written on `disk`; a copy where the
    kernel cannot (before 6.6: no user attributes in a tmpfs).
    """
    os.mkdir(f"{disk}/upper", 0o755)
    os.mkdir(f"{disk}/work")
    try:
        linux.mount(
            "overlay",
            place,
            "overlay",
            _SAFE,
            f"lowerdir=/proc/self/fd/{lower},upperdir={disk}/upper,workdir={disk}/work,userxattr",
        )
    except OSError:
        linux.mount(f"{disk}/upper", place, None, linux.MS_BIND)
        target = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        copy_tree(lower, target)
        os.close(target)


def _inodes() -> int:
    status = os.statvfs(DISK)
    return status.f_files - status.f_ffree


def _write_settings(etc: str) -> None:
    for name, text in (
        ("passwd", _PASSWD),
        ("group", _GROUP),
        ("hosts", _HOSTS),
        ("resolv.conf", _RESOLVER),
    ):
        linux.write_file(f"{etc}/{name}", text.encode())
    for name in _COPIED_SETTINGS:
        if os.path.isfile(f"/etc/{name}"):
            linux.write_file(f"{etc}/{name}", linux.read_file(f"/etc/{name}"))
    if os.path.exists("/etc/localtime"):
        if os.path.realpath("/etc/localtime").startswith("/usr/"):
            os.symlink(os.path.realpath("/etc/localtime"), f"{etc}/localtime")
        else:
            linux.write_file(f"{etc}/localtime", linux.read_file("/etc/localtime"))
    if os.path.isdir("/etc/alternatives"):  # Debian's awk, vi, java, ... are links through it
        os.mkdir(f"{etc}/alternatives")
        linux.mount("/etc/alternatives", f"{etc}/alternatives", None, linux.MS_BIND)


def _be_init(lifeline: socket.socket, waiting_program: int) -> None:
    """The life of process 1. Never returns.

    In the end it is a program that reads until the holder's end of the lifeline closes: a tenth of
    this process's memory. It has the commands' own id, but they cannot open it, for it may only be
    executed, nor end it.
    """
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        _make_view()
        view = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        socket.send_fds(lifeline, [b"ready"], [view])
        os.dup2(lifeline.fileno(), 0)
        linux.drop_capabilities()
        signal.signal(
            signal.SIGCHLD, signal.SIG_IGN
        )  # orphans are collected by the kernel, also after the exec
        os.execve(waiting_program, ["init"], {})
    except OSError as error:
        lifeline.send(str(error).encode()[:4000])
    finally:
        os._exit(0)


def _make_view() -> None:
    """A second mount namespace whose root is ROOT: what commands see, and nothing of the host
    beneath it.
    """
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(ROOT, ROOT, None, linux.MS_BIND | linux.MS_REC)
    linux.restrict_mount(ROOT, linux.MS_RDONLY | _SAFE, recursive=True)
    linux.mount("proc", f"{ROOT}/proc", "proc", _SAFE | linux.MS_NOEXEC)
    linux.write_file(f"{ROOT}/proc/sys/user/max_user_namespaces", b"0")
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
        os.close(os.open(f"{dev}/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
        linux.mount(f"/dev/{name}", f"{dev}/{name}", None, linux.MS_BIND)
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"{dev}/{name}")
    for name in ("shm", "pts"):
        os.mkdir(f"{dev}/{name}")
    linux.mount(
        "devpts",
        f"{dev}/pts",
        "devpts",
        linux.MS_NOSUID | linux.MS_NOEXEC,
        "newinstance,ptmxmode=0666,mode=620",
    )
    linux.mount("tmpfs", f"{dev}/shm", "tmpfs", _SAFE, f"size={SHM_BYTES},mode=1777")
    linux.restrict_mount(dev, linux.MS_RDONLY)
