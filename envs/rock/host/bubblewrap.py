"""The bubblewrap tier, inside a holder: a private file tree made once, and a fresh hardened bwrap for each command.

The holder lives in a user and mount namespace of its own, under an id that owns nothing on the host. There it builds

    /tmp/root       what commands see as /, read-only: /usr and its links, a few files of /etc
    /tmp/verifier   hidden files of the verifier while it runs
    /tmp/disk       one tmpfs, limited in bytes and inodes, that holds both `workspace` and `tmp` of the sandbox

and every command gets new pid, network, IPC, UTS, cgroup, mount and user namespaces over them.
"""

import contextlib
import json
import os
import pathlib
import resource
import select
import shutil
import signal

from . import linux, seccomp

ROOT, DISK, HIDDEN = "/tmp/root", "/tmp/disk", "/tmp/verifier"
INNER_ID = 1000
SHM_BYTES = 16 << 20
HIDDEN_BYTES = 64 << 20  # room for a verifier's files; no command can write there
START_SECONDS = 10.0
REPOSITORY = str(pathlib.Path(__file__).resolve().parents[3])

_PASSWD = """root:x:0:0:root:/nonexistent:/usr/sbin/nologin
agent:x:1000:1000::/workspace:/bin/bash
nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin
"""
_GROUP = "root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n"
_HOSTS = "127.0.0.1 localhost\n::1 localhost\n"
_COPIED_SETTINGS = ("ld.so.cache", "nsswitch.conf", "magic")


def enter_namespaces(mapping: "Mapping") -> None:
    """New user and mount namespaces in which this process is `root`, while the kernel knows it by an id that owns nothing.

    As real root the namespace is made first and the id dropped after it: systems that restrict user namespaces of ordinary ids
    allow that, and no process of a sandbox ever runs with the kernel's id 0 (which could write /proc/sys).
    """
    if os.geteuid() == 0:
        os.setgroups([])
    linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS)
    mapping.wait()
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


class Mapping:
    """Only a process outside a new user namespace may map an id that is not its own: the zygote does it for its holder."""

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
        """In the zygote, after fork: map 0 inside to (uid, gid) outside. A holder that failed before is noticed by its silence."""
        os.close(self._unshared[1])
        try:
            if select.select([self._unshared[0]], [], [], START_SECONDS)[0] and os.read(self._unshared[0], 1):
                if os.geteuid() != 0:
                    pathlib.Path(f"/proc/{pid}/setgroups").write_text("deny")
                pathlib.Path(f"/proc/{pid}/gid_map").write_text(f"0 {gid} 1\n")
                pathlib.Path(f"/proc/{pid}/uid_map").write_text(f"0 {uid} 1\n")
                os.write(self._mapped[1], b"m")
        except OSError:
            pass  # the holder finds the pipe closed and reports it
        finally:
            for descriptor in (self._unshared[0], *self._mapped):
                os.close(descriptor)


def build_tree(disk_bytes: int, inodes: int) -> str:
    """Mount the sandbox's file tree; returns the directory that is the workspace."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    safe = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", "/tmp", "tmpfs", safe, f"size={HIDDEN_BYTES},nr_inodes=1k,mode=0755")
    for directory in (DISK, HIDDEN, ROOT, *(f"{ROOT}/{name}" for name in ("usr", "etc", "proc", "dev", "tmp", "workspace", "run"))):
        os.mkdir(directory)
    linux.mount("tmpfs", DISK, "tmpfs", safe, f"size={disk_bytes},nr_inodes={inodes + 3},mode=0755")
    os.mkdir(f"{DISK}/workspace", 0o755)
    os.mkdir(f"{DISK}/tmp")
    os.chmod(f"{DISK}/tmp", 0o1777)
    linux.mount("/usr", f"{ROOT}/usr", None, linux.MS_BIND | linux.MS_REC)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{ROOT}/{name}")
        elif os.path.isdir(f"/{name}"):
            os.mkdir(f"{ROOT}/{name}")
            linux.mount(f"/{name}", f"{ROOT}/{name}", None, linux.MS_BIND | linux.MS_REC)
    if REPOSITORY.startswith("/usr/"):  # verifiers and task generators lie there
        linux.mount("tmpfs", f"{ROOT}{REPOSITORY}", "tmpfs", safe | linux.MS_RDONLY, "size=4k,mode=0755")
    _write_settings(f"{ROOT}/etc")
    return f"{DISK}/workspace"


def _write_settings(etc: str) -> None:
    for name, text in (("passwd", _PASSWD), ("group", _GROUP), ("hosts", _HOSTS)):
        pathlib.Path(etc, name).write_text(text)
    for name in _COPIED_SETTINGS:
        if os.path.isfile(f"/etc/{name}"):
            shutil.copyfile(f"/etc/{name}", f"{etc}/{name}")
    if os.path.exists("/etc/localtime"):
        if os.path.realpath("/etc/localtime").startswith("/usr/"):
            os.symlink(os.path.realpath("/etc/localtime"), f"{etc}/localtime")
        else:
            shutil.copyfile("/etc/localtime", f"{etc}/localtime")
    if os.path.isdir("/etc/alternatives"):  # Debian's awk, vi, java, ... are links through it
        os.mkdir(f"{etc}/alternatives")
        linux.mount("/etc/alternatives", f"{etc}/alternatives", None, linux.MS_BIND)


_NAMESPACES = ("--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(INNER_ID), "--gid", str(INNER_ID),
               "--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
_TREE = ("--ro-bind", ROOT, "/", "--proc", "/proc", "--dev", "/dev", "--size", str(SHM_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
         "--bind", f"{DISK}/workspace", "/workspace", "--chdir", "/workspace")


class Tier:
    """How a holder works with bubblewrap; fenced.Tier is its twin."""

    watches_disk = False  # the tmpfs itself enforces the limits
    workspace, hidden = "/workspace", HIDDEN

    def __init__(self, spec: dict, cgroup_entries: list[int]):
        self._spec = spec
        self._cgroup_entries = cgroup_entries
        self._filter = seccomp.build(linux.ARCHITECTURE, network=True)

    def set_up(self) -> int:
        """Enter the namespaces and build the tree; returns a descriptor of the workspace."""
        enter_namespaces(self._spec["mapping"])
        workspace = build_tree(self._spec["disk_bytes"], self._spec["inodes"])
        # Counted inside this sandbox's own user namespace, so siblings do not eat each other's share.
        linux.lower_limit(resource.RLIMIT_NPROC, self._spec["pids"] + 4)  # the holder, bwrap's two, and the one being forked
        return os.open(workspace, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def start_agent(self, command: str, environment: dict, out: int, err: int) -> "Started":
        return self._start(["--bind", f"{DISK}/tmp", "/tmp", "--", "/bin/bash", "-c", command], environment, out, err, [])

    def start_verifier(self, script: int, environment: dict, out: int, err: int) -> "Started":
        """The grader: its own empty /tmp, hidden files in /run/verifier, and a bash that its children cannot look into.

        That bash is an execute-only copy, so the kernel marks the process undumpable: what the verifier runs (the agent's program,
        say) cannot read its memory, environment or descriptors through /proc. The script is a descriptor, never a file.
        """
        script_fd, bash_fd = linux.FIRST_PASSED_FD, linux.FIRST_PASSED_FD + 1
        tail = ["--size", str(self._spec["disk_bytes"]), "--tmpfs", "/tmp", "--tmpfs", "/run", "--ro-bind", HIDDEN, "/run/verifier",
                "--perms", "0111", "--ro-bind-data", str(bash_fd), "/run/bash", "--remount-ro", "/run",
                "--", "/run/bash", f"/proc/self/fd/{script_fd}"]
        with open("/bin/bash", "rb") as bash:
            return self._start(tail, environment | {"VERIFIER_FILES": "/run/verifier"}, out, err, [script, bash.fileno()])

    def _start(self, tail: list[str], environment: dict, out: int, err: int, passed: list[int]) -> "Started":
        """Start bwrap, put the process that will become the command into its cgroups, and only then let it go on.

        posix_spawn, and the cgroups joined from outside, because a fork of this Python process would cost as much as all of bwrap.
        bwrap's outer process stays out of the cgroups, where the OOM killer would otherwise find it.
        """
        for directory in ("workspace", "tmp"):
            linux.restore_access(f"{DISK}/{directory}")
        status_read, status_write = os.pipe()
        filter_read, filter_write = os.pipe()
        go_read, go_write = os.pipe()
        os.write(filter_write, self._filter)  # 2 KB: fits a pipe
        os.close(filter_write)
        passed = [*passed, filter_read, status_write, go_read]
        numbers = range(linux.FIRST_PASSED_FD, linux.FIRST_PASSED_FD + len(passed))
        filter_fd, status_fd, go_fd = map(str, numbers[-3:])
        program = self._spec["bwrap"]
        arguments = [program, *_NAMESPACES, *_TREE, "--seccomp", filter_fd, "--json-status-fd", status_fd, "--block-fd", go_fd, *tail]
        try:
            pid = linux.spawn(arguments, environment, out, err, passed)
        except OSError:
            os.close(status_read)
            os.close(go_write)
            raise
        finally:
            for descriptor in (status_write, filter_read, go_read):
                os.close(descriptor)
        started = Started(pid, status_read)
        try:
            if started.read_inner_pid():
                for entry in self._cgroup_entries:
                    os.write(entry, str(started.inner_pid).encode())
        except OSError:
            os.kill(pid, signal.SIGKILL)  # never let it run outside its limits
            started.failure = "the command could not be put into its cgroups"
        finally:
            os.close(go_write)  # the end of the pipe is the signal to go on
        return started

    def kill_leftovers(self) -> None:
        """Nothing can be left that is not a child of the holder: every command is in a pid namespace of its own."""

    @contextlib.contextmanager
    def as_owner(self):
        """Files are made under the right id already."""
        yield


class Started:
    """A bwrap that is running, and what it says of itself on its status descriptor."""

    def __init__(self, pid: int, status_fd: int):
        self.pid, self.inner_pid, self.failure = pid, None, ""
        self._status_fd, self._said = status_fd, b""

    def read_inner_pid(self) -> bool:
        """Wait until bwrap names the first process inside; False when it ends before."""
        while b"\n" not in self._said:
            if not select.select([self._status_fd], [], [], START_SECONDS)[0]:
                raise OSError(f"bwrap said nothing for {START_SECONDS:.0f} s")
            piece = os.read(self._status_fd, 4096)
            if not piece:
                return False
            self._said += piece
        self.inner_pid = json.loads(self._said.splitlines()[0])["child-pid"]
        return True

    def kill(self) -> None:
        """SIGKILL to the first process inside, with which its whole pid namespace dies before bwrap reports its end."""
        os.kill(self.inner_pid or self.pid, signal.SIGKILL)

    def exit_code(self, bwrap_code: int) -> int:
        """The command's own exit code, which nothing inside can forge. Sets `failure` if bwrap ended before there was one."""
        while piece := os.read(self._status_fd, 4096):
            self._said += piece
        for line in self._said.splitlines():
            if (code := json.loads(line).get("exit-code")) is not None:
                return code
        self.failure = self.failure or f"bwrap ended with {bwrap_code} before the command did"
        return bwrap_code

    def close(self) -> None:
        os.close(self._status_fd)
