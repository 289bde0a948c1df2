"""Places that tests read: the repository, and data sets that may lie beside it."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def shared_data(name: str) -> pathlib.Path:
    """Return a file or folder of the data sets outside the repository; skip where it is not there.

    They lie in the folder that SHARED_DATA names, or in shared/data beside the repository.
    """
    folder = pathlib.Path(os.environ.get("SHARED_DATA") or ROOT.parent / "shared" / "data")
    path = folder / name
    if not path.exists():
        pytest.skip(f"no {name} in {folder}; SHARED_DATA=DIR names the folder that has it")
    return path
