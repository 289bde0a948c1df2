"""Memory that a step has freed is there for the next one: no page is asked of the system again."""

import pathlib
import platform
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
STEPS = """
import resource, sys
from rome.train.memory import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sum(jnp.sin(x[:, None] * x[None, :]) @ jnp.ones((2048, 2048))))  # two temporaries of 16 MiB, from the backend's own threads
faults = []
for _ in range(5):
    step(jnp.ones(2048)).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library, which has no such setting")
def test_a_step_meets_no_fresh_pages():
    kept, given_back = (int(subprocess.run([sys.executable, "-c", STEPS, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout)
                        for arguments in (["keep"], []))
    assert kept < 500 and given_back > 2000, (kept, given_back)


def test_training_asks_for_it_before_jax_is_imported():
    text = (ROOT / "launch/train.py").read_text()
    assert text.index("keep_freed_memory()") < text.index("apply_flags()\n    config")
