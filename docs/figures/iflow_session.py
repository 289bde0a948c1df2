"""A session of the iFlow agent in a terminal: docs/images/iflow_session.svg.

python -m docs.figures.iflow_session

Runs the real command in a real pseudo-terminal on a small project with a failing test. Only the
model is a script. Needs pyte (tests/requirements-live.txt).
"""

from __future__ import annotations

import contextlib
import html
import os
import pathlib
import re
import tempfile
from typing import Any

from docs.figures import style
from tests.rome.agent.iflow.pseudo_terminal import PseudoTerminal
from tests.rome.agent.iflow.scripted import Say, ScriptedEndpoint

COLUMNS = 92
ROWS = 46
CHARACTER = 8.4  # width of one at FONT_SIZE
LINE = 18.0
FONT_SIZE = 14
MARGIN = 14.0
BACKGROUND = "#0d1117"
FOREGROUND = "#d0d7de"
# What a terminal names, as this page shows it.
COLOURS = {
    "default": FOREGROUND,
    "black": "#484f58",
    "red": "#ff7b72",
    "green": "#7ee787",
    "brown": "#e3b341",
    "blue": "#79c0ff",
    "magenta": "#d2a8ff",
    "cyan": "#56d4dd",
    "white": "#f0f6fc",
}

PARSER = "def total(prices):\n    return sum(int(price) for price in prices)\n"
TEST = """import unittest

from shop import total


class TotalTest(unittest.TestCase):
    def test_cents_count(self):
        self.assertEqual(total(["1.50", "2"]), 3.5)
"""
RUN = "python3 -m unittest -q"
SCRIPT = [
    Say("I run the tests first.", [("shell", {"command": RUN})]),
    Say("`int` cannot read cents.", [("read_file", {"path": "shop.py"})]),
    Say(
        calls=[
            ("edit", {"path": "shop.py", "old_string": "int(price)", "new_string": "float(price)"})
        ]
    ),
    Say("And once more:", [("shell", {"command": RUN})]),
    Say(
        "The test passes. `total` in `shop.py` read each price by `int`, which refuses `1.50`;\n"
        "it reads them by `float` now."
    ),
]


def draw() -> None:
    """Play the session and write its picture."""
    with tempfile.TemporaryDirectory() as folder:
        lines = _play(pathlib.Path(folder))
    style.IMAGES.mkdir(exist_ok=True)
    (style.IMAGES / "iflow_session.svg").write_text(_to_svg(lines))


def _play(folder: pathlib.Path) -> list[Any]:
    """Return the rows of the screen, after all that a user types was answered."""
    project, home = folder / "shop", folder / "home"
    project.mkdir()
    home.mkdir()
    (project / "shop.py").write_text(PARSER)
    (project / "test_shop.py").write_text(TEST)
    with _home(home), ScriptedEndpoint(SCRIPT, model="qwen3-coder") as endpoint:
        flags = ["-m", "launch.agent", "--workspace=host", f"--base_url={endpoint.url}"]
        with PseudoTerminal(flags, directory=project, columns=COLUMNS, rows=ROWS) as terminal:
            terminal.wait_for("iFlow in", "context 0%", seconds=60)
            terminal.enter("The test fails; fix it.")
            terminal.wait_for("Allow?", seconds=60)
            terminal.enter("a")
            terminal.wait_for("+    return", "Allow?", seconds=60)
            terminal.enter("y")
            terminal.wait_for("by float now", "tokens", seconds=60)
            terminal.enter("/feedback accept")
            terminal.wait_for("feedback: accept", seconds=60)
            terminal.read(1.0)
            shown = [terminal.screen.buffer[row] for row in range(ROWS)]
            rows = [_pieces(row) for row in (*terminal.screen.history.top, *shown)]
    return [
        [(at, text.replace(str(folder), "~"), *look) for at, text, *look in row] for row in rows
    ]


@contextlib.contextmanager
def _home(home: pathlib.Path) -> Any:
    """Let the command have a home without settings, and no variables of the user's."""
    before = dict(os.environ)
    for name in before:
        if re.match("IFLOW_|OPENAI_", name):
            del os.environ[name]
    os.environ["HOME"] = str(home)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _pieces(row: Any) -> list[tuple[int, str, str, bool]]:
    """Return the pieces of a row that look alike: column, text, colour, whether bold."""
    pieces: list[tuple[int, str, str, bool]] = []
    for column in range(COLUMNS):
        cell = row[column]
        colour = COLOURS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else FOREGROUND)
        if cell.reverse:
            colour = FOREGROUND
        if pieces and pieces[-1][2:] == (colour, cell.bold):
            start, text, *_ = pieces[-1]
            pieces[-1] = (start, text + cell.data, colour, cell.bold)
        else:
            pieces.append((column, cell.data, colour, cell.bold))
    return [piece for piece in pieces if piece[1].strip()]


def _to_svg(lines: list[Any]) -> str:
    while lines and not lines[-1]:
        lines.pop()
    width = COLUMNS * CHARACTER + 2 * MARGIN
    height = len(lines) * LINE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' font-family="monospace" font-size="{FONT_SIZE}" role="img"'
        ' aria-label="A session of iFlow in a terminal">',
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
    ]
    for number, pieces in enumerate(lines):
        y = MARGIN + (number + 0.75) * LINE
        for column, text, colour, is_bold in pieces:
            shown = text.rstrip()
            x = MARGIN + column * CHARACTER
            weight = ' font-weight="bold"' if is_bold else ""
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" textLength="{len(shown) * CHARACTER:.1f}"'
                f' xml:space="preserve" fill="{colour}"{weight}>{html.escape(shown)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    draw()
