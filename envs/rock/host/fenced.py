"""The Landlock tier, inside a holder: for machines that refuse user namespaces (ordinary
containers, Colab).

Landlock fences files, seccomp refuses sockets, rlimits bound each process, and as root every
sandbox has a user id of its own, by which all it left behind can be killed. There is no private
/proc, no total memory limit without cgroups, and the disk limit is a watchdog's: envs.rock.tiers
names what is missing.
"""

import os
import resource
import signal
import stat
import time
from collections.abc import Callable

from . import landlock, linux, seccomp
from .process import Started, start
from .tree import copy_tree

KILL_SECONDS = 10.0


class Tier:
    """How a holder works in this tier; namespaces.Tier is its twin."""

    watches_disk = True
    guard = None  # no socket of a network can be made at all, and nothing is told of attempts

    def __init__(self, spec: dict, cgroup_entries: list[int]):
        self._spec = spec
        self._cgroup_entries = cgroup_entries
        self._own_uid = os.geteuid() == 0
        self._home = spec["directory"]
        self.workspace, self._temporary, self._hidden = (
            f"{self._home}/{name}" for name in ("workspace", "tmp", "verifier")
        )

    def set_up(self) -> int:
        """Make the directories and the rules; returns a descriptor of the workspace."""
        for directory in (self.workspace, self._temporary):
            os.mkdir(directory, 0o700)
            if self._own_uid:
                os.chown(directory, self._spec["uid"], self._spec["gid"])
        os.mkdir(self._hidden, 0o755)
        if self._spec["snapshot"]:
            self._copy(
                (self._spec["snapshot"], self._home),
                (self._spec["uid"], self._spec["gid"]) if self._own_uid else None,
            )
        self._ruleset = landlock.ruleset((self.workspace, self._temporary), (self._hidden,))
        self._filter = seccomp.build(
            linux.ARCHITECTURE, network=False, own_processes=self._own_uid or landlock.abi() >= 6
        )
        return os.open(self.workspace, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def copy_to(self, target: int) -> None:
        """Copy workspace and temporary files into a directory."""
        for name in ("workspace", "tmp"):
            os.mkdir(name, 0o700, dir_fd=target)
        self._copy((self._home, f"/proc/self/fd/{target}"), None)

    def _copy(self, places: tuple[str, str], owner: tuple[int, int] | None) -> None:
        for name in ("workspace", "tmp"):
            source, target = (
                os.open(f"{place}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                for place in places
            )
            try:
                copy_tree(source, target, owner)
            finally:
                os.close(source), os.close(target)

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
            self._become(arguments[0], arguments, environment)

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
        """The grader.

        As root its bash is execute-only, so that its children cannot look into it (see
        namespaces.py). What it writes is kept always.
        """
        for name, content in files.items():
            linux.write_file(f"{self._hidden}/{name}", content)
        bash = self._spec["verifier_bash"] if self._own_uid else "/bin/bash"

        def become() -> None:
            os.dup2(script, linux.FIRST_PASSED_FD)
            self._become(
                bash,
                ["bash", f"/proc/self/fd/{linux.FIRST_PASSED_FD}"],
                environment | {"VERIFIER_FILES": self._hidden},
            )

        return self._start(become, out, err)

    def _start(self, become: Callable[[], None], out: int, err: int) -> Started:
        for directory in (self.workspace, self._temporary):
            linux.restore_access(directory)
        return start(become, self._cgroup_entries, out, err)

    def _become(self, program: str | int, arguments: list[str], environment: dict) -> None:
        """Fence this process and turn it into the command."""
        os.chdir(self.workspace)
        self._limit_resources()
        if self._own_uid:
            os.setgroups([])
            os.setresgid(*[self._spec["gid"]] * 3)
            os.setresuid(*[self._spec["uid"]] * 3)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(self._ruleset)
        linux.install_filter(self._filter)
        os.execve(
            program, arguments, environment | {"HOME": self.workspace, "TMPDIR": self._temporary}
        )

    def _limit_resources(self) -> None:
        memory = self._spec["memory_bytes"]
        # DATA bounds heaps; AS, wider because threads and runtimes reserve address space that they
        # never touch, the rest.
        linux.lower_limit(resource.RLIMIT_DATA, memory)
        linux.lower_limit(resource.RLIMIT_AS, memory + (2 << 30))
        linux.lower_limit(
            resource.RLIMIT_NPROC,
            self._spec["pids"] + (0 if self._own_uid else _processes_of(os.getuid())),
        )

    def as_owner(self) -> "_Owner":
        """Files are opened and made as the sandbox's id, never with root's rights."""
        return _Owner(self._spec["uid"], self._spec["gid"], self._own_uid)

    def finished(self) -> None:
        """A command ended: hidden files go before the agent's next command can come."""
        for entry in os.scandir(self._hidden):
            os.unlink(entry.path)

    def kill_leftovers(self) -> int:
        """Kill and collect every process of this sandbox, which lost its parent to us; returns how
        many resisted.
        """
        deadline = time.monotonic() + KILL_SECONDS
        self._kill_all()
        while children := linux.children_of(os.getpid()):
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                continue
            if time.monotonic() > deadline:
                return len(children)
            time.sleep(0.0005)
        return 0

    def _kill_all(self) -> None:
        if self._own_uid:
            linux.kill_all_of(self._spec["uid"])
            return
        linux.kill_trees(lambda: linux.descendants_of(set(linux.children_of(os.getpid()))))

    def close(self) -> None:
        """Nothing is left: `kill_leftovers` came before."""

    def usage(self) -> tuple[int, int]:
        """(bytes, inodes) that the sandbox has on disk."""
        total = count = 0
        counted: set[int] = set()  # a file of several names is one file
        pending = [self.workspace, self._temporary]
        while pending:
            try:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        status = entry.stat(follow_symlinks=False)
                        count += 1
                        total += 0 if status.st_ino in counted else status.st_blocks * 512
                        counted.add(status.st_ino)
                        if stat.S_ISDIR(status.st_mode):
                            pending.append(entry.path)
            except OSError:
                # it vanished, or an ordinary user may not look: the watchdog counts what it can see
                continue
            if count > self._spec["inodes"]:
                break
        return total, count


class _Owner:
    def __init__(self, uid: int, gid: int, changes: bool):
        self._ids, self._changes = (uid, gid), changes

    def __enter__(self) -> None:
        if self._changes:
            linux.set_filesystem_ids(*self._ids)

    def __exit__(self, *_: object) -> None:
        if self._changes:
            linux.set_filesystem_ids(0, 0)


def _processes_of(uid: int) -> int:
    count = 0
    for name in os.listdir("/proc"):
        try:
            count += name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid
        except FileNotFoundError:
            continue
    return count
