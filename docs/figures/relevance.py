"""Errors of Rel(k) by kind of turn, on labelled turns: docs/images/relevance.png.

python -m docs.figures.relevance
"""

from __future__ import annotations

from benchmarks.masks import error_rates
from docs.figures.style import BLUE, GRAY, ORANGE, new_figure, save
from rome.train.intervals import wilson


def draw() -> None:
    """Draw a bar for each kind of turn, with Wilson's 95 % interval."""
    kinds = error_rates()["by_kind"]
    figure, axis = new_figure(8.0, 4.6)
    for place, (kind, (wrong, of)) in enumerate(reversed(kinds.items())):
        colour = BLUE if kind.startswith("relevant") else ORANGE
        low, high = wilson(wrong, of)
        axis.barh(place, 100 * wrong / of, color=colour, height=0.6)
        axis.plot([100 * low, 100 * high], [place, place], color=GRAY, linewidth=1.5)
    labels = [f"{kind}  (n = {of})" for kind, (_, of) in reversed(kinds.items())]
    axis.set_yticks(range(len(kinds)), labels)
    axis.set(xlim=(0, 102), xlabel="turns that Rel gets wrong, %  (line: 95 % interval)")
    save(figure, "relevance.png")


if __name__ == "__main__":
    draw()
