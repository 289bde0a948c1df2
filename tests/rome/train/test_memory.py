"""Memory that a step has freed is there for the next one."""

import platform
import subprocess
import sys

import pytest

from tests.paths import ROOT

STEPS = """
import os, sys, threading
from rome.train.memory import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
import numpy as np
def step():
    # 64 MiB, freed at once: glibc maps a block of more than 32 MiB for itself, whatever it has
    # learnt of the program
    np.ones(8 << 20).sum()
for _ in range(3):  # in a thread of its own, as JAX's are
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library, which has no such setting"
)
def test_what_a_step_frees_stays_with_the_process():
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", STEPS, *arguments],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            ).stdout
        )
        for arguments in (["keep"], [])
    )
    assert kept > given_back + 48, (kept, given_back)


TRAINING = """
import sys
from launch import train
from launch._main import parse_flags
from rome.train import memory

def asked():
    from jax._src import xla_bridge
    print("devices were looked for:", xla_bridge.backends_are_initialized())
    sys.exit(0)

memory.keep_freed_memory = asked
train.main(parse_flags("launch.train", ["launch.train", "--config=experiments/ipa.py:smoke"])[:1])
"""


@pytest.mark.long
def test_training_asks_for_it_before_jax_looks_for_devices_and_starts_threads():
    ended = subprocess.run(
        [sys.executable, "-c", TRAINING], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout == "devices were looked for: False\n", ended.stderr
