"""Grading of Python packages by their own tests, safe against the code under test.

SWE-bench and repair tasks put it into the tests folder of a Harbor task.
"""

from envs.tasks.judge.folder import FRAMEWORKS, judge_files, pytest_archive

__all__ = ["FRAMEWORKS", "judge_files", "pytest_archive"]
