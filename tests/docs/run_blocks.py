"""Runs the Python blocks of a page in order and in one namespace.

python -m tests.docs.run_blocks PAGE
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import pathlib
import sys

from tests.docs.pages import blocks


def main(path: pathlib.Path) -> None:
    """Run every block; a block may use `await` at its top level."""
    namespace = {"__name__": "page"}
    for number, block in enumerate(blocks(path, "python")):
        name = f"{path.name}, block {number}"
        code = compile(block, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, namespace)
        if inspect.iscoroutine(result):
            asyncio.run(result)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
