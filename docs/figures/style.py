"""One look for all pictures of the documentation: colours, fonts, boxes and arrows."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

IMAGES = pathlib.Path(__file__).parent.parent / "images"
DPI = 200  # a picture 8 inches wide has 1,600 pixels and is shown at 800

INK = "#24292f"
MUTED = "#6e7781"
LINE = "#d0d7de"
PAPER = "#ffffff"
BLUE = "#2f6fb5"
ORANGE = "#d9822b"
GREEN = "#3a8f5c"
RED = "#c0504d"
PURPLE = "#7d5ba6"
GRAY = "#9aa4ae"
# fills of boxes that hold text
PALE = {
    BLUE: "#e8f0f9",
    ORANGE: "#fcf1e4",
    GREEN: "#e7f4ec",
    RED: "#fae9e8",
    PURPLE: "#f1ebf8",
    GRAY: "#f3f5f7",
}

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


def new_figure(width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of this size in inches and its axes, as `plt.subplots` does."""
    plt.rcParams.update(RC)
    return plt.subplots(figsize=(width, height), layout="constrained", **options)


def new_canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure without axes lines, for a drawing.

    The units are inches from the lower left corner.
    """
    plt.rcParams.update(RC)
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def save(figure: Figure, name: str) -> pathlib.Path:
    """Write docs/images/NAME and return its path."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / name
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return path


def box(
    axes: Axes,
    corner: tuple[float, float],
    size: tuple[float, float],
    colour: str,
    title: str = "",
    text: str = "",
    *,
    title_size: float = 10.5,
    text_size: float = 8.5,
) -> None:
    """Draw a rounded box with a bold title at its top and smaller text below it."""
    x, y = corner
    width, height = size
    axes.add_patch(
        FancyBboxPatch(
            corner,
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=PALE[colour],
            edgecolor=colour,
            linewidth=1.2,
        )
    )
    top = y + height - 0.13
    if title:
        axes.text(x + 0.14, top, title, va="top", ha="left", fontsize=title_size, fontweight="bold")
        top -= 0.26
    if text:
        axes.text(x + 0.14, top, text, va="top", ha="left", fontsize=text_size, linespacing=1.45)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    label: str = "",
    *,
    colour: str = INK,
    at: float = 0.5,
    shift: tuple[float, float] = (0.0, 0.09),
    align: str = "center",
    curve: float = 0.0,
) -> None:
    """Draw an arrow; its label stands at the share `at` of the way, moved by `shift` inches."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            linewidth=1.3,
            color=colour,
            connectionstyle=f"arc3,rad={curve}",
            shrinkA=0,
            shrinkB=0,
        )
    )
    if label:
        x = start[0] + at * (end[0] - start[0]) + shift[0]
        y = start[1] + at * (end[1] - start[1]) + shift[1]
        axes.text(x, y, label, ha=align, va="center", fontsize=8.5, color=colour)
