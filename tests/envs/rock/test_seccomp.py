"""The system-call filter, run in a small interpreter of classic BPF, for both architectures."""

import errno
import struct

import pytest

from envs.rock.host import seccomp

NUMBERS = {
    "x86_64": {
        "read": 0,
        "clone": 56,
        "socket": 41,
        "socketpair": 53,
        "ioctl": 16,
        "kill": 62,
        "prlimit64": 302,
        "unshare": 272,
        "shmget": 29,
        "fcntl": 72,
        "io_setup": 206,
        "sync": 162,
        "inotify_init1": 294,
        "sched_setaffinity": 203,
        "sched_setscheduler": 144,
        "setpriority": 141,
        "ioprio_set": 251,
        "openat2": 437,
    },
    "aarch64": {
        "read": 63,
        "clone": 220,
        "socket": 198,
        "socketpair": 199,
        "ioctl": 29,
        "kill": 129,
        "prlimit64": 261,
        "unshare": 97,
        "shmget": 194,
        "fcntl": 25,
        "io_setup": 0,
        "sync": 81,
        "inotify_init1": 26,
        "sched_setaffinity": 122,
        "sched_setscheduler": 119,
        "setpriority": 140,
        "ioprio_set": 30,
        "openat2": 437,
    },
}


def decide(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would answer: the filter's return value."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = place = 0
    while True:
        code, yes, no, value = instructions[place]
        if code == 0x06:
            return value
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        else:
            taken = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x45: bool(accumulator & value),
            }[code]
            place += yes if taken else no
        place += 1


def refused(code: int) -> int:
    return 0x00050000 | code


@pytest.fixture(params=["x86_64", "aarch64"])
def call(request):
    names, architecture = NUMBERS[request.param], seccomp.ARCHITECTURES[request.param]

    def ask(name, *arguments, network=True, own_processes=True):
        program = seccomp.build(request.param, network=network, own_processes=own_processes)
        return decide(program, architecture, names.get(name, name), *arguments)

    return ask


def test_ordinary_calls_pass(call):
    answers = {
        call("read"),
        call("openat2"),
        call("clone", 0x11),
        call("clone", 0x3D0F00),
        call("ioctl", 0, 0x5401),
        call("kill", 5, 9),
    }
    assert answers | {call("kill", 2**64 - 1, 9)} == {seccomp.ALLOW}


@pytest.mark.parametrize(
    "flag", [0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000]
)
def test_no_clone_makes_a_namespace(call, flag):
    assert (
        call("clone", flag | 0x11) == call("clone", flag | 0x11 | (1 << 40)) == refused(errno.EPERM)
    )


def test_no_clone_makes_a_child_of_another_parent(call):
    """Threads and forks pass; clone3, whose flags lie in memory, does not exist."""
    for others in (0, 0x11, 0x4111, 0x3D0F00, 1 << 40):
        assert call("clone", 0x8000 | others) == refused(errno.EPERM)
    assert call(435) == refused(errno.ENOSYS)


def test_socket_families_are_a_short_list(call):
    assert [family for family in range(60) if call("socket", family) == seccomp.ALLOW] == [1, 2, 10]
    assert [
        family for family in range(60) if call("socket", family, network=False) == seccomp.ALLOW
    ] == []
    assert [
        family for family in range(60) if call("socketpair", family, network=False) == seccomp.ALLOW
    ] == [1]


def test_without_a_network_namespace_shared_ipc_is_refused_too(call):
    assert call("shmget") == seccomp.ALLOW and call("shmget", network=False) == refused(errno.EPERM)


def test_tables_of_the_whole_host_are_not_taken_from(call):
    assert call("io_setup", 128) == refused(errno.ENOSYS)
    assert call("sync") == refused(0)  # which is a success


def test_nobody_waits_for_a_lease_and_locks_pass(call):
    setlease, notify, setlk, setlkw, getfl = 1024, 1026, 6, 7, 3
    for command in (setlease, notify, setlease | 1 << 40):
        assert call("fcntl", 3, command) == refused(errno.EPERM)
    assert {call("fcntl", 3, command) for command in (setlk, setlkw, getfl)} == {seccomp.ALLOW}


def test_without_namespaces_the_host_is_neither_watched_nor_scheduled(call):
    assert call("inotify_init1") == seccomp.ALLOW
    assert call("inotify_init1", network=False) == refused(errno.ENOSYS)
    for name in ("sched_setaffinity", "sched_setscheduler"):
        assert call(name, 0, network=False) == call(name, 77) == seccomp.ALLOW
        assert call(name, 77, network=False) == refused(errno.EPERM)
    for name, process in (("setpriority", 0), ("ioprio_set", 1)):
        assert call(name, process, 0, network=False) == seccomp.ALLOW
        assert call(name, process, 77) == seccomp.ALLOW
        for kind, who in ((process, 77), (process + 1, 0), (process + 2, 0), (process + 2, 77)):
            assert call(name, kind, who, network=False) == refused(errno.EPERM)


def test_killing_everyone_is_refused_where_it_would_reach_the_host(call):
    assert (
        call("kill", 2**64 - 1, 9, own_processes=False)
        == call("kill", 2**32 - 1, 9, own_processes=False)
        == refused(errno.EPERM)
    )
    assert call("kill", 77, 9, own_processes=False) == seccomp.ALLOW


def test_limits_of_another_process_cannot_be_set(call):
    assert call("prlimit64", 0, 7) == seccomp.ALLOW and call("prlimit64", 1, 7) == refused(
        errno.EPERM
    )


def test_terminal_injection_is_refused_in_any_width(call):
    assert (
        call("ioctl", 0, 0x5412)
        == call("ioctl", 0, 0x5412 | (7 << 32))
        == call("ioctl", 0, 0x541C)
        == refused(errno.EPERM)
    )


def test_calls_that_nobody_has_looked_at_do_not_exist(call):
    assert (
        call(seccomp.NEWEST_CALL + 1)
        == call(100_000)
        == call(0x40000000 | 41)
        == refused(errno.ENOSYS)
    )


def test_another_architecture_is_killed():
    for name, foreign in (("x86_64", "aarch64"), ("aarch64", "x86_64")):
        assert (
            decide(seccomp.build(name, network=True), seccomp.ARCHITECTURES[foreign], 0)
            == seccomp.KILL
        )
    assert decide(seccomp.build("x86_64", network=True), 0x40000003, 11) == seccomp.KILL  # i386


def test_every_denied_call_is_denied_and_the_filter_fits_a_pipe():
    for column, name in enumerate(seccomp.ARCHITECTURES):
        program = seccomp.build(name, network=False)
        assert len(program) < 4096
        for numbers in (*seccomp.DENIED.values(), *seccomp.SHARED_IPC.values()):
            if numbers[column] is not None:
                assert decide(program, seccomp.ARCHITECTURES[name], numbers[column]) == refused(
                    errno.EPERM
                )


def test_an_unknown_machine_is_an_error():
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.build("riscv64", network=True)
