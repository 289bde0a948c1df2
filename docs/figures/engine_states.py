"""The states of an engine in the pool: docs/images/engine_states.png.

python -m docs.figures.engine_states
"""

from __future__ import annotations

from docs.figures.style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    arrow,
    box,
    new_canvas,
    save,
)

WIDTH = 1.45
HEIGHT = 0.62
PLACES = {
    "starting": (0.3, 2.55, GRAY, "joined or restarted"),
    "ready": (3.2, 2.55, GREEN, "serves"),
    "updating": (6.2, 2.55, BLUE, "takes new weights"),
    "dead": (0.3, 0.5, RED, "nobody answers"),
    "suspect": (3.2, 0.5, ORANGE, "in quarantine"),
    "lent": (6.2, 0.5, PURPLE, "the learner has it"),
}


def side(state: str, x: float, y: float) -> tuple[float, float]:
    """Return the point at these shares of a state's box."""
    left, bottom, _, _ = PLACES[state]
    return left + x * WIDTH, bottom + y * HEIGHT


def draw() -> None:
    """Draw the states and what moves an engine between them."""
    figure, axes = new_canvas(8.0, 3.6)
    for state, (x, y, colour, text) in PLACES.items():
        box(axes, (x, y), (WIDTH, HEIGHT), colour, state, text, text_size=8)
    arrow(axes, side("starting", 1, 0.5), side("ready", 0, 0.5), "weights proven")
    arrow(axes, side("ready", 1, 0.75), side("updating", 0, 0.75), "new weights")
    arrow(axes, side("updating", 0, 0.25), side("ready", 1, 0.25), "proven", shift=(0, -0.11))
    arrow(
        axes,
        side("ready", 0.6, 0),
        side("suspect", 0.6, 1),
        "hangs, or\nanswers with\nunproven weights",
        at=0.62,
        shift=(0.1, 0),
        align="left",
        colour=ORANGE,
    )
    arrow(
        axes,
        side("suspect", 0.05, 1),
        side("starting", 0.95, 0),
        "supervisor\ntries again",
        at=0.3,
        shift=(-0.12, -0.16),
        align="right",
    )
    arrow(
        axes,
        side("updating", 0.15, 0),
        side("suspect", 1, 0.8),
        "update or\nproof failed",
        at=0.75,
        shift=(0.14, -0.2),
        align="left",
        colour=ORANGE,
    )
    arrow(axes, side("suspect", 0, 0.5), side("dead", 1, 0.5), "no answer", colour=RED)
    arrow(
        axes,
        side("dead", 0.5, 1),
        side("starting", 0.5, 0),
        "restarted",
        shift=(0.1, 0.2),
        align="left",
    )
    arrow(
        axes,
        side("ready", 0.95, 0),
        side("lent", 0, 0.9),
        "lend",
        at=0.75,
        shift=(0.12, 0.1),
        align="left",
        colour=PURPLE,
    )
    arrow(
        axes,
        side("lent", 0.6, 1),
        side("updating", 0.6, 0),
        "given\nback",
        shift=(0.1, 0),
        align="left",
        colour=PURPLE,
    )
    axes.text(
        0.3,
        0.14,
        "Requests of an engine that leaves the state ready continue on another one,"
        " from the tokens that they have.",
        fontsize=8.5,
        color=INK,
    )
    save(figure, "engine_states.png")


if __name__ == "__main__":
    draw()
