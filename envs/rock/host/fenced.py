"""The landlock tier, in a holder: for machines that refuse user namespaces, such as Colab.

Landlock restricts files, seccomp refuses sockets, rlimits bound each process, and as root every
sandbox has a user id of its own, by which all it left behind can be killed. There is no private
/proc, no total memory limit without cgroups, and the holder only checks the disk limit from time to
time. Landlock has no rights for modes, owners, times and attributes of files: as an ordinary user
commands can change those of that user's files. envs.rock.tiers names what is missing.
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
BLOCK_BYTES = 512  # the unit of st_blocks
_COPIED = ("workspace", "tmp")
# Commands cannot read /etc, on which git and node fail unless they are told not to look there.
WITHOUT_ETC = {"GIT_CONFIG_NOSYSTEM": "1", "OPENSSL_CONF": "/dev/null"}


class Tier:
    """What a holder does differently in this tier; namespaces.Tier has the same methods."""

    watches_disk = True
    guard = None  # no network socket can be made at all, and attempts are not recorded

    def __init__(self, spec: dict, cgroup_entries: list[int]):
        self._spec = spec
        self._cgroup_entries = cgroup_entries
        self._own_uid = os.geteuid() == 0
        self._home = spec["directory"]
        self.workspace = f"{self._home}/workspace"
        self._temporary = f"{self._home}/tmp"
        self._hidden = f"{self._home}/verifier"
        self._tools = spec["verifier_tools"]

    def set_up(self) -> int:
        """Make the directories and the rules; return a descriptor of the workspace."""
        self._make_directories()
        writable = (self.workspace, self._temporary)
        self._ruleset = landlock.ruleset(writable, (self._hidden,))
        self._verifier_ruleset = self._ruleset
        if self._tools:
            if self._own_uid:
                _check_others_may_enter(self._tools)
            self._verifier_ruleset = landlock.ruleset(writable, (self._hidden, self._tools))
        own_processes = self._own_uid or landlock.abi() >= landlock.FIRST_ABI_WITH_SCOPES
        self._filter = linux.Filter(
            seccomp.build(linux.ARCHITECTURE, network=False, own_processes=own_processes)
        )
        return os.open(self.workspace, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _make_directories(self) -> None:
        """Make the sandbox's directories, with the files of its snapshot."""
        owner = None
        if self._own_uid:
            owner = (self._spec["uid"], self._spec["gid"])
        for directory in (self.workspace, self._temporary):
            os.mkdir(directory, 0o700)
            if owner:
                os.chown(directory, *owner)
        os.mkdir(self._hidden, 0o755)
        snapshot = self._spec["snapshot"]
        if snapshot:
            _copy(snapshot, self._home, owner)

    def copy_to(self, target: int) -> None:
        """Copy the workspace and the temporary files into a directory."""
        for name in _COPIED:
            os.mkdir(name, 0o700, dir_fd=target)
        _copy(self._home, f"/proc/self/fd/{target}", None)

    def start_agent(
        self,
        arguments: list[str],
        environment: dict,
        out: int,
        err: int,
        prepare: Callable[[], None] | None = None,
    ) -> Started:
        """Start a command; see namespaces.Tier.start_agent."""

        def become() -> None:
            if prepare:
                prepare()
            self._become(arguments[0], arguments, environment, self._ruleset)

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
        """Start a verifier's script; see namespaces.Tier.start_verifier.

        Its bash is execute-only only as root. What it writes in the workspace always stays.
        """
        for name, content in files.items():
            linux.write_file(f"{self._hidden}/{name}", content)
        bash = self._spec["verifier_bash"] if self._own_uid else "/bin/bash"
        arguments = ["bash", f"/proc/self/fd/{linux.FIRST_PASSED_FD}"]
        variables = environment | {"VERIFIER_FILES": self._hidden}
        if self._tools:
            variables["VERIFIER_TOOLS"] = self._tools

        def become() -> None:
            os.dup2(script, linux.FIRST_PASSED_FD)
            self._become(bash, arguments, variables, self._verifier_ruleset)

        return self._start(become, out, err)

    def _start(self, become: Callable[[], None], out: int, err: int) -> Started:
        for directory in (self.workspace, self._temporary):
            linux.restore_access(directory)
        return start(become, self._cgroup_entries, out, err)

    def _become(
        self, program: str | int, arguments: list[str], environment: dict, ruleset: int
    ) -> None:
        """Restrict this process and turn it into the command."""
        os.chdir(self.workspace)
        self._limit_resources()
        if self._own_uid:
            os.setgroups([])
            uid = self._spec["uid"]
            gid = self._spec["gid"]
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(ruleset)
        linux.install_filter(self._filter)
        own = {"HOME": self.workspace, "TMPDIR": self._temporary}
        os.execve(program, arguments, WITHOUT_ETC | environment | own)

    def _limit_resources(self) -> None:
        linux.limit_memory(self._spec["memory_bytes"])
        linux.lower_limit(resource.RLIMIT_NOFILE, self._spec["open_files"])
        others = 0 if self._own_uid else _count_processes(os.getuid())
        linux.lower_limit(resource.RLIMIT_NPROC, self._spec["pids"] + others)

    def as_owner(self) -> "_Owner":
        """Return a context in which files are opened and made as the sandbox's user."""
        return _Owner(self._spec["uid"], self._spec["gid"], self._own_uid)

    def finished(self) -> None:
        """Remove a verifier's files before the agent's next command can start."""
        for entry in os.scandir(self._hidden):
            os.unlink(entry.path)

    def kill_leftovers(self) -> int:
        """Kill and collect every process of this sandbox; return how many survived.

        Processes that lost their parent are children of the holder.
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
        """Close the tier; nothing is left to do after `kill_leftovers`."""

    def usage(self) -> tuple[int, int]:
        """Return the bytes and inodes that the sandbox has on disk."""
        total = 0
        count = 0
        counted: set[int] = set()  # a file of several names is one file
        pending = [self.workspace, self._temporary]
        while pending:
            try:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        status = entry.stat(follow_symlinks=False)
                        count += 1
                        if status.st_ino not in counted:
                            total += status.st_blocks * BLOCK_BYTES
                            counted.add(status.st_ino)
                        if stat.S_ISDIR(status.st_mode):
                            pending.append(entry.path)
            except OSError:
                # It vanished, or an ordinary user may not read it: count the rest.
                continue
            if count > self._spec["inodes"]:
                break
        return total, count


class _Owner:
    def __init__(self, uid: int, gid: int, changes: bool):
        self._ids = (uid, gid)
        self._changes = changes

    def __enter__(self) -> None:
        if self._changes:
            linux.set_filesystem_ids(*self._ids)

    def __exit__(self, *_: object) -> None:
        if self._changes:
            linux.set_filesystem_ids(0, 0)


def _copy(source_home: str, target_home: str, owner: tuple[int, int] | None) -> None:
    """Copy the workspace and the temporary files of one home into another."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    for name in _COPIED:
        source = os.open(f"{source_home}/{name}", flags)
        target = os.open(f"{target_home}/{name}", flags)
        try:
            copy_tree(source, target, owner)
        finally:
            os.close(source)
            os.close(target)


def _check_others_may_enter(path: str) -> None:
    """Raise OSError if a sandbox's own user id cannot reach a directory."""
    place = path
    while True:
        if not os.stat(place).st_mode & stat.S_IXOTH:
            raise OSError(
                f"verifier_tools {path}: the sandbox's user may not enter {place}; chmod o+x it, or"
                " put the tools elsewhere"
            )
        if place == "/":
            return
        place = os.path.dirname(place)


def _count_processes(uid: int) -> int:
    """Return how many processes a user has."""
    count = 0
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += 1
        except FileNotFoundError:
            continue
    return count
