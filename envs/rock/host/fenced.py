"""The Landlock tier, inside a holder: for machines that refuse user namespaces (ordinary containers, Colab).

Landlock fences files, seccomp refuses sockets, rlimits bound each process, and as root every sandbox has a user id of its own, by
which all it left behind can be killed. There is no private /proc, no total memory limit without cgroups, and the disk limit is a
watchdog's: envs.rock.tiers names what is missing.
"""

import contextlib
import os
import resource
import shutil
import signal
import stat
from collections.abc import Callable

from . import landlock, linux, seccomp


class Tier:
    """How a holder works in this tier; bubblewrap.Tier is its twin."""

    watches_disk = True

    def __init__(self, spec: dict, cgroup_entries: list[int]):
        self._spec = spec
        self._cgroup_entries = cgroup_entries
        self._own_uid = os.geteuid() == 0
        self._home = spec["directory"]
        self.workspace, self._temporary, self.hidden = (f"{self._home}/{name}" for name in ("workspace", "tmp", "verifier"))

    def set_up(self) -> int:
        """Make the directories and the rules; returns a descriptor of the workspace."""
        for directory in (self.workspace, self._temporary):
            os.mkdir(directory, 0o700)
            if self._own_uid:
                os.chown(directory, self._spec["uid"], self._spec["gid"])
        os.mkdir(self.hidden, 0o755)
        self._ruleset = landlock.ruleset((self.workspace, self._temporary), (self.hidden,))
        self._filter = seccomp.build(linux.ARCHITECTURE, network=False, own_processes=self._own_uid or landlock.abi() >= 6)
        return os.open(self.workspace, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def start_agent(self, command: str, environment: dict, out: int, err: int) -> "Started":
        return self._start(lambda: self._become(["/bin/bash", "-c", command], environment), out, err)

    def start_verifier(self, script: int, environment: dict, out: int, err: int) -> "Started":
        """The grader. As root its bash is an execute-only copy, into which its children cannot look (see bubblewrap.py)."""
        bash = "/bin/bash"
        if self._own_uid:
            bash = f"{self.hidden}/.bash"
            shutil.copyfile("/bin/bash", bash)
            os.chmod(bash, 0o111)

        def become() -> None:
            os.dup2(script, linux.FIRST_PASSED_FD)
            self._become([bash, f"/proc/self/fd/{linux.FIRST_PASSED_FD}"], environment | {"VERIFIER_FILES": self.hidden})

        return self._start(become, out, err)

    def _start(self, become: Callable[[], None], out: int, err: int) -> "Started":
        for directory in (self.workspace, self._temporary):
            linux.restore_access(directory)
        failure_read, failure_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for entry in self._cgroup_entries:
                    os.write(entry, b"0")
                os.dup2(os.open("/dev/null", os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(err, 2)
                for number in linux.RESTORED_SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                become()
            except BaseException as error:  # noqa: B036 - whatever it was, this fork must not go on as a second holder
                os.write(failure_write, str(error).encode()[:2000])
            finally:
                os._exit(125)
        os.close(failure_write)
        with open(failure_read, "rb") as failure:  # the pipe closes when the new program starts
            return Started(pid, failure.read().decode(errors="replace"))

    def _become(self, arguments: list[str], environment: dict) -> None:
        """Fence this process and turn it into the command."""
        os.setsid()
        os.chdir(self.workspace)
        self._limit_resources()
        if self._own_uid:
            os.setgroups([])
            os.setresgid(*[self._spec["gid"]] * 3)
            os.setresuid(*[self._spec["uid"]] * 3)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(self._ruleset)
        linux.install_filter(self._filter)
        os.execve(arguments[0], arguments, environment | {"HOME": self.workspace, "TMPDIR": self._temporary})

    def _limit_resources(self) -> None:
        memory = self._spec["memory_bytes"]
        # DATA bounds heaps; AS, wider because threads and runtimes reserve address space that they never touch, the rest.
        linux.lower_limit(resource.RLIMIT_DATA, memory)
        linux.lower_limit(resource.RLIMIT_AS, memory + (2 << 30))
        linux.lower_limit(resource.RLIMIT_NPROC, self._spec["pids"] + (0 if self._own_uid else _processes_of(os.getuid())))

    @contextlib.contextmanager
    def as_owner(self):
        """Files are opened and made as the sandbox's id, never with root's rights."""
        if self._own_uid:
            linux.set_filesystem_ids(self._spec["uid"], self._spec["gid"])
        try:
            yield
        finally:
            if self._own_uid:
                linux.set_filesystem_ids(0, 0)

    def kill_leftovers(self) -> None:
        """Send SIGKILL to every process of this sandbox. The holder, their reaper, waits for them."""
        if self._own_uid:
            linux.kill_all_of(self._spec["uid"])
            return
        stopped: set[int] = set()
        while fresh := _descendants(os.getpid()) - stopped:  # stop them all first, or they fork while they are killed
            for pid in fresh:
                _send(pid, signal.SIGSTOP)
            stopped |= fresh
        for pid in stopped:
            _send(pid, signal.SIGKILL)

    def usage(self) -> tuple[int, int]:
        """(bytes, inodes) that the sandbox has on disk."""
        total = count = 0
        pending = [self.workspace, self._temporary]
        while pending:
            try:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        status = entry.stat(follow_symlinks=False)
                        total, count = total + status.st_blocks * 512, count + 1
                        if stat.S_ISDIR(status.st_mode):
                            pending.append(entry.path)
            except OSError:
                continue  # it vanished, or an ordinary user may not look: the watchdog counts what it can see
            if count > self._spec["inodes"]:
                break
        return total, count


class Started:
    """A command that is running."""

    inner_pid = None

    def __init__(self, pid: int, failure: str):
        self.pid, self.failure = pid, failure

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def exit_code(self, code: int) -> int:
        return code

    def close(self) -> None:
        """Nothing is held."""


def _processes_of(uid: int) -> int:
    count = 0
    for name in os.listdir("/proc"):
        try:
            count += name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid
        except FileNotFoundError:
            continue
    return count


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    pending = [pid]
    while pending:
        fresh = [child for child in linux.children_of(pending.pop()) if child not in found]
        found.update(fresh)
        pending += fresh
    return found


def _send(pid: int, signal_number: int) -> None:
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        pass
