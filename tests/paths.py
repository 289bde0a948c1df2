"""Places that tests read: the repository, and data sets that may lie beside it."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
