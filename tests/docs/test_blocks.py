"""The Python that the documents show runs as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from envs.rock import probe
from tests.docs.pages import PAGES, ROOT, blocks, name_of

# the README on every change; the pages, which the examples overlap, in make test-all
WITH_PYTHON = [
    pytest.param(path, id=name_of(path), marks=[pytest.mark.slow] if path.parent != ROOT else [])
    for path in PAGES
    if blocks(path, "python")
]
NEEDS_NAMESPACES = ("README.md", "docs/sandboxes.md")


@pytest.mark.parametrize("path", WITH_PYTHON)
def test_the_python_of_a_page_runs(path, tmp_path):
    if name_of(path) in NEEDS_NAMESPACES and probe("best_available").tier != "namespaces":
        pytest.skip("this page starts sandboxes that require namespaces, refused on this machine")
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.run_blocks", str(path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
