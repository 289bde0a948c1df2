"""The shipped tasks before Harbor's own checks of task folders (`harbor lint`)."""

import pytest

from envs.tasks.harbor import EXAMPLES

# Rules of published data sets that the examples do not follow; docs/datasets.md says why.
NOT_FOLLOWED = {"unpinned-image", "root-agent", "shared-verifier"}


@pytest.mark.live
def test_harbors_checks_find_nothing_in_the_examples_but_what_the_document_names():
    lint = pytest.importorskip("harbor.lint", reason="needs harbor, tests/requirements-live.txt")
    folders = [folder for folder in sorted(EXAMPLES.iterdir()) if (folder / "task.toml").exists()]
    found = [finding for folder in folders for finding in lint.lint_task(folder)]
    others = [finding for finding in found if str(finding.rule) not in NOT_FOLLOWED]
    assert folders and not others
