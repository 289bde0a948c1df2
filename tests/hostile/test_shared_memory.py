"""Hostile commands: shared memory and queues end with the commands that made them."""

import pytest

from tests.hostile.sandboxes import inside, make_config, needs, python

# Segments without a process that has them open; the kernel keeps them until they are removed.
MEMORY = """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
for key in range(40):
    identity = libc.shmget(key + 1, 1 << 20, 0o1600)
    libc.memset(ctypes.c_void_p(libc.shmat(identity, 0, 0)), 1, 1 << 20)
print(identity >= 0)
"""
QUEUE = """
import ctypes
libc = ctypes.CDLL(None)
queue = libc.msgget(1, 0o1600)
message = ctypes.create_string_buffer(8 + 4000)
message[0] = 1
print(queue >= 0 and libc.msgsnd(queue, message, 4000, 0) == 0)
"""
SEMAPHORES = """
import ctypes
print(ctypes.CDLL(None).semget(1, 100, 0o1600) >= 0)
"""
NAMED_QUEUE = """
import ctypes
library = ctypes.CDLL("librt.so.1")
print(library.mq_open(b"/left", 0o102, 0o600, None) >= 0)
"""
COUNT = "cat /proc/sysvipc/* | grep -vc key; " + python(
    "import ctypes; print(ctypes.CDLL('librt.so.1').mq_open(b'/left', 2))"
)


@pytest.mark.parametrize("deed", [MEMORY, QUEUE, SEMAPHORES, NAMED_QUEUE])
@pytest.mark.parametrize("how", ["execute", "session", "kill_all"])
def test_no_object_of_shared_ipc_outlives_its_commands(deed, how):
    async def work(sandbox):
        if how == "session":
            async with await sandbox.create_session() as session:
                made = await session.run(python(deed))
        else:
            made = await sandbox.execute(python(deed))
        if how == "kill_all":
            await sandbox.kill_all()
        return made.stdout, (await sandbox.execute(COUNT)).stdout

    assert inside(make_config("namespaces"), work) == ("True\n", "0\n-1\n")


def test_a_sessions_commands_share_memory_while_it_is_open():
    async def work(sandbox):
        async with await sandbox.create_session() as session:
            await session.run(python(MEMORY))
            return (await session.run("grep -vc key /proc/sysvipc/shm")).stdout

    assert inside(make_config("namespaces"), work) == "40\n"


def test_memory_left_in_segments_does_not_starve_the_verifier():
    needs("namespaces", "memory")

    async def work(sandbox):
        filled = await sandbox.execute(python(MEMORY))
        verified = await sandbox.verify("x=$(head -c 8M /dev/zero | tr '\\0' x); echo ${#x}")
        return filled.stdout, verified.stdout, verified.limits_hit

    config = make_config("namespaces", memory_mb=64, disk_mb=8)
    assert inside(config, work) == ("True\n", "8388608\n", ())
