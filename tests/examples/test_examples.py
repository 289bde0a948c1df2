"""Every example runs and prints what its subject promises."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tests.processes import user_environment

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PRINTS = {
    "01_sandbox": ("session: agent is in work", "stopped by: timeout", "verdict: 1"),
    "02_environment_loop": ("seed 4: reward 1.0",),
    "03_task_family": ("reward: 1.0",),
    "04_loss": ("weights", "0.118", "-0.118"),
    "05_environment": ("Count down from 3.", "1."),
    "sft_on_messages": ("1 set aside", "bits a token: 10.", "role 'wizard'"),
    "learner_library": ("update 0: log p(rewarded) -", "update 2: log p(rewarded) -"),
    "own_environment": ("reward: 1.0", "Reverse/1000000"),
    "06_evaluate_endpoint": ("delete_named/1000000: success", "count/1000000: failure"),
}
COMPILING = ("sft_on_messages", "learner_library")


def test_every_example_is_tested_and_short():
    programs = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in programs] == sorted(PRINTS)
    for path in programs:
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in COMPILING else name for name in PRINTS],
)
def test_an_example_runs(name):
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}"],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text in PRINTS[name]:
        assert text in done.stdout


@pytest.mark.slow
def test_the_notebook_agrees_with_the_loss():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "ipa_by_hand.ipynb", as_version=4)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    NotebookClient(notebook, timeout=800, resources=resources).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "equal for all 28 sampled tokens" in printed


def test_the_notebook_has_no_outputs_in_the_repository():
    import nbformat

    notebook = nbformat.read(EXAMPLES / "ipa_by_hand.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
