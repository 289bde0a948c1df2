"""The namespaces tier, in a holder: a private machine, and a fork of the holder for each command.

    holder    has all capabilities in user, mount, network, IPC, UTS and cgroup namespaces of its
              own, and none outside them
    init      process 1 of the sandbox's pid namespace: makes the mounts that commands see
              (mounts.py), then becomes a program that only waits
    command   joins the sandbox's cgroups and mounts, loses every capability, has its system calls
              filtered, and is executed

The kernel knows all three by a user id that owns nothing on the host.
"""

import os
import resource
import signal
import socket
import time
from collections.abc import Callable

from . import egress, linux, mounts, seccomp
from .process import Started, start
from .tree import copy_tree

INNER_ID = 1000  # user and group id in the user namespace
OWN_PROCESSES = 2  # the holder and init, which count against the sandbox's limit
START_SECONDS = 10.0
KILL_SECONDS = 10.0
RETRY_SECONDS = 0.0005
MAX_MESSAGE_BYTES = 4096

_NAMESPACES = (
    linux.CLONE_NEWUSER
    | linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
)


class Mapping:
    """The map of user ids of a new user namespace.

    Only a process outside may map an id that is not its own, so the zygote writes the map for its
    holder; two pipes synchronise them.
    """

    def __init__(self) -> None:
        self._unshared_read, self._unshared_write = os.pipe()
        try:
            self._mapped_read, self._mapped_write = os.pipe()
        except OSError:
            os.close(self._unshared_read)
            os.close(self._unshared_write)
            raise

    def descriptors(self) -> tuple[int, ...]:
        """Return the ends of both pipes."""
        return (
            self._unshared_read,
            self._unshared_write,
            self._mapped_read,
            self._mapped_write,
        )

    def close(self) -> None:
        """Close both pipes, where no holder could be forked."""
        for descriptor in self.descriptors():
            os.close(descriptor)

    def wait(self) -> None:
        """Wait for the map, in the holder and after unshare."""
        os.write(self._unshared_write, b"u")
        os.close(self._mapped_write)  # else a dead zygote would leave us waiting
        if not os.read(self._mapped_read, 1):
            raise OSError("the user namespace's id map could not be written")
        for descriptor in (self._unshared_read, self._unshared_write, self._mapped_read):
            os.close(descriptor)

    def serve(self, pid: int, uid: int, gid: int) -> None:
        """Map INNER_ID to (uid, gid) outside, in the zygote and after the fork of the holder.

        A holder that failed before is noticed by its silence.
        """
        os.close(self._unshared_write)
        try:
            ready = linux.wait_readable(self._unshared_read, START_SECONDS)
            if ready and os.read(self._unshared_read, 1):
                if os.geteuid() != 0:
                    linux.write_file(f"/proc/{pid}/setgroups", b"deny")
                linux.write_file(f"/proc/{pid}/gid_map", f"{INNER_ID} {gid} 1\n".encode())
                linux.write_file(f"/proc/{pid}/uid_map", f"{INNER_ID} {uid} 1\n".encode())
                os.write(self._mapped_write, b"m")
        except OSError:
            return  # the holder finds the pipe closed and reports it
        finally:
            for descriptor in (self._unshared_read, self._mapped_read, self._mapped_write):
                os.close(descriptor)


class Tier:
    """What a holder does differently in this tier; fenced.Tier has the same methods."""

    watches_disk = False  # the tmpfs itself enforces the limits
    workspace = "/workspace"

    def __init__(self, spec: dict, cgroup_entries: list[int]):
        self._spec = spec
        self._cgroup_entries = cgroup_entries
        self._is_shm_abandoned = False  # whether nobody uses what is in /dev/shm
        self._filter = linux.Filter(seccomp.build(linux.ARCHITECTURE, network=True))
        if spec["verifier_tools"]:
            # Entered here, because the path may be closed to the sandbox's own user id, and the
            # current directory follows a process into its new mount namespace.
            os.chdir(spec["verifier_tools"])

    def set_up(self) -> int:
        """Enter the namespaces, mount and start init; return a descriptor of the workspace."""
        spec = self._spec
        _enter_namespaces(spec)
        self._interpreters = _open_interpreters(spec["interpreters"])
        grants = [egress.Grant(*fields) for fields in spec["egress"]]
        self.guard = egress.Guard(grants)
        mounts.build_tree(
            spec["disk_bytes"], spec["inodes"], spec["snapshot"], bool(spec["verifier_tools"])
        )
        self._first_inodes = mounts.used_inodes()
        # A program can never get a capability; the holder keeps those it has.
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.drop_bounding_set()
        self._start_init()
        self._renew_shared_ipc()  # init stays in the first namespace
        return os.open(f"{mounts.TREE}/workspace", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _start_init(self) -> None:
        """Start process 1 and get a descriptor of the mount namespace that it makes."""
        self._lifeline, theirs = socket.socketpair()  # init ends when our end closes
        self._init = os.fork()
        if self._init == 0:
            _be_init(theirs, self._spec["waiting_program"])
        theirs.close()
        self._lifeline.settimeout(START_SECONDS)
        said, descriptors, _, _ = socket.recv_fds(self._lifeline, MAX_MESSAGE_BYTES, 1)
        if not descriptors:
            words = said.decode(errors="replace")
            raise OSError(words or "the sandbox's init ended before it began")
        self._mounts = descriptors[0]
        os.set_inheritable(self._mounts, False)

    def start_agent(
        self,
        arguments: list[str],
        environment: dict,
        out: int,
        err: int,
        prepare: Callable[[], None] | None = None,
    ) -> Started:
        """Start a command.

        Args:
          arguments: the program's path and its arguments.
          environment: its variables.
          out: descriptor of its standard output.
          err: descriptor of its standard error.
          prepare: called first in the new process.
        """

        def become() -> None:
            if prepare:
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
        """Start a verifier's script.

        It has its own view of the workspace, its own empty /tmp, shared memory and IPC, its files
        in /run/verifier, and its tools in /run/tools. Its bash and the system's Python are
        execute-only, so the kernel makes their processes undumpable: what they run (the agent's
        program, for example) can neither read nor change their memory, environment or descriptors
        through /proc. The script is a descriptor, never a file.

        Args:
          script: descriptor of the script.
          files: name -> content.
          environment: its variables.
          out: descriptor of its standard output.
          err: descriptor of its standard error.
          keep: whether what it writes in the workspace stays there.
        """
        has_tools = bool(self._spec["verifier_tools"])
        variables = environment | {"VERIFIER_FILES": "/run/verifier"}
        if has_tools:
            variables["VERIFIER_TOOLS"] = "/run/tools"
        arguments = ["bash", f"/proc/self/fd/{linux.FIRST_PASSED_FD}"]

        def become() -> None:
            copies = []
            for program, copy in self._interpreters:
                copies.append((program, linux.clone_mount(copy)))
            tools = linux.clone_mount(mounts.TOOLS) if has_tools else None
            self._enter()
            linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
            for program, mount in copies:
                linux.attach_mount(mount, program)
                linux.restrict_mount(program, linux.MS_RDONLY | mounts.SAFE)
            mounts.mount_verifier_places(self._spec["disk_bytes"])
            if not keep:
                mounts.cover_workspace(
                    self.workspace, self._spec["disk_bytes"], self._spec["inodes"]
                )
            os.mkdir("/run/verifier")
            for name, content in files.items():
                linux.write_file(f"/run/verifier/{name}", content)
            if tools is not None:
                os.mkdir("/run/tools")
                linux.attach_mount(tools, "/run/tools")
                linux.restrict_mount("/run/tools", linux.MS_RDONLY | mounts.SAFE, recursive=True)
            linux.restrict_mount("/run", linux.MS_RDONLY)
            os.dup2(script, linux.FIRST_PASSED_FD)
            os.set_inheritable(linux.FIRST_PASSED_FD, True)
            self._execute(self._spec["verifier_bash"], arguments, variables)

        return self._start(become, out, err)

    def _start(self, become: Callable[[], None], out: int, err: int) -> Started:
        for directory in ("workspace", "tmp"):
            linux.restore_access(f"{mounts.TREE}/{directory}")
        started = start(become, self._cgroup_entries, out, err)
        self._is_shm_abandoned = False
        return started

    def _enter(self) -> None:
        """Move from the holder's mounts into those of the sandbox."""
        linux.setns(self._mounts, linux.CLONE_NEWNS)
        if self._is_shm_abandoned:
            mounts.empty_shared_memory()
        os.chdir(self.workspace)

    def _execute(self, program: str | int, arguments: list[str], environment: dict) -> None:
        # Processes are counted in this sandbox's own user namespace, so siblings do not use up each
        # other's share. The limit is set here and not in the holder, whose forks must not fail when
        # a fork bomb has reached it.
        linux.lower_limit(resource.RLIMIT_NPROC, self._spec["pids"] + OWN_PROCESSES)
        linux.lower_limit(resource.RLIMIT_NOFILE, self._spec["open_files"])
        if not self._cgroup_entries:  # then each process is limited, if not all together
            linux.limit_memory(self._spec["memory_bytes"])
        linux.drop_capabilities()
        linux.install_filter(self._filter)
        os.execve(program, arguments, environment)

    def finished(self) -> None:
        """Clean up after a command; nothing is kept for one here."""

    def kill_leftovers(self) -> int:
        """Kill what commands left and wait for its end; return how many processes survived.

        A process that lost its parent in the pid namespace is a child of init, which collects dead
        children without being asked.
        """
        deadline = time.monotonic() + KILL_SECONDS
        while left := linux.children_of(self._init) + self._unknown_children():
            if time.monotonic() > deadline:
                return len(left)
            linux.kill_all_of()
            self._kill_unknown_children()
            time.sleep(RETRY_SECONDS)
        self._renew_shared_ipc()
        return 0

    def _renew_shared_ipc(self) -> None:
        """Give the next commands a fresh IPC namespace; the last one's objects end with it.

        System V segments and message queues live on without any process, charged to the sandbox.
        So do the files of POSIX shared memory, which end when the next command or verifier starts.
        """
        linux.unshare(linux.CLONE_NEWIPC)
        self._is_shm_abandoned = True

    def _unknown_children(self) -> list[int]:
        """Return the holder's children beside init; called while no command and session is left.

        The filter refuses every call known to make one. One that exists all the same would outlive
        its command, and init could not end before it was collected.
        """
        return [pid for pid in linux.children_of(os.getpid()) if pid != self._init]

    def _kill_unknown_children(self) -> None:
        for pid in self._unknown_children():
            linux.signal_process(pid, signal.SIGKILL)
            linux.collect(pid)

    def usage(self) -> tuple[int, int]:
        """Return the bytes and inodes of the workspace and /tmp."""
        status = os.statvfs(mounts.DISK)
        size = (status.f_blocks - status.f_bfree) * status.f_frsize
        return size, mounts.used_inodes() - self._first_inodes

    def copy_to(self, target: int) -> None:
        """Copy the workspace and /tmp into a directory."""
        source = os.open(mounts.TREE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            copy_tree(source, target)
        finally:
            os.close(source)

    def close(self) -> None:
        """End init, and with it every process that is left.

        What is still there after KILL_SECONDS is left to the zygote, which inherits and kills it.
        """
        deadline = time.monotonic() + KILL_SECONDS
        self._lifeline.close()
        while not linux.collect(self._init) and time.monotonic() < deadline:
            self._kill_unknown_children()
            time.sleep(RETRY_SECONDS)

    def as_owner(self) -> "_NoChange":
        """Return a context in which files are made as the sandbox's user, which is so already."""
        return _NoChange()


class _NoChange:
    def __enter__(self) -> None:
        """Change nothing."""

    def __exit__(self, *_: object) -> None:
        """Change nothing back."""


def _open_interpreters(copies: list[tuple[str, str]]) -> list[tuple[str, int]]:
    """Open the copies of interpreters now: they may lie in /tmp, which is covered next.

    Those that cannot be mounted here are left out, lest a verifier fail where commands do not.
    """
    opened = []
    for program, copy in copies:
        descriptor = os.open(copy, os.O_PATH | os.O_CLOEXEC)
        try:
            os.close(linux.clone_mount(descriptor))
        except OSError:
            os.close(descriptor)
        else:
            opened.append((program, descriptor))
    return opened


def _enter_namespaces(spec: dict) -> None:
    """Enter new namespaces with every capability in them, under an id that owns nothing outside.

    As real root the id is dropped first and the capabilities kept: systems that restrict user
    namespaces of ordinary users allow that, the kernel counts what the sandbox takes from the
    host's tables (watches of files, queued signals) to that id and not to root, and no process of a
    sandbox ever runs with the kernel's id 0, which could write /proc/sys.
    """
    if os.geteuid() == 0:
        os.setgroups([])
        linux.prctl(linux.PR_SET_SECUREBITS, linux.SECBIT_NO_SETUID_FIXUP)
        os.setresgid(spec["gid"], spec["gid"], spec["gid"])
        os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    linux.unshare(_NAMESPACES)  # the pid namespace begins with the next fork
    spec["mapping"].wait()
    os.setresgid(INNER_ID, INNER_ID, INNER_ID)
    os.setresuid(INNER_ID, INNER_ID, INNER_ID)
    socket.sethostname("sandbox")
    linux.raise_loopback()


def _be_init(lifeline: socket.socket, waiting_program: int) -> None:
    """Run as process 1; never returns.

    In the end it becomes a program that reads until the holder's end of the lifeline closes, which
    takes a tenth of this process's memory. It has the commands' own user id, but they can neither
    open it, for it may only be executed, nor end it.
    """
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        mounts.enter_view()
        view = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        socket.send_fds(lifeline, [b"ready"], [view])
        os.dup2(lifeline.fileno(), 0)
        linux.drop_capabilities()
        # The kernel collects orphans, also after the exec.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.execve(waiting_program, ["init"], {})
    except OSError as error:
        lifeline.send(str(error).encode()[:MAX_MESSAGE_BYTES])
    finally:
        os._exit(0)
