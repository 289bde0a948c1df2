"""Grades Python packages by their own tests, whatever the code under test does: what SWE-bench and
repair tasks put into the tests folder of a Harbor task.
"""

from envs.tasks.judge.folder import FRAMEWORKS, judge_files, pytest_archive

__all__ = ["FRAMEWORKS", "judge_files", "pytest_archive"]
