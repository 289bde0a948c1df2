"""The site builds without a warning."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")


def test_indented_blocks_of_docstrings_become_code_and_sections_stay():
    pytest.importorskip("griffe", reason="requirements-docs.txt is not installed; make docs")
    from docs.docstrings import fence_indented_blocks

    text = "Summary.\n\n  wait  long\n  keep  all\n\nArgs:\n  a: one.\n\n  b: two.\n\nEnd."
    assert fence_indented_blocks(text) == (
        "Summary.\n\n```text\nwait  long\nkeep  all\n```\n\nArgs:\n  a: one.\n\n  b: two.\n\nEnd."
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"requirements-docs.txt is not installed: {', '.join(missing)}; make docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "algorithms" / "index.html").read_text().count("<math") > 10
