"""Which package may import which: docs/images/layers.png.

python -m docs.figures.layers
"""

from __future__ import annotations

from docs.figures.style import BLUE, GRAY, GREEN, MUTED, ORANGE, arrow, box, new_canvas, save

WIDTH = 1.62
HEIGHT = 0.44


def draw() -> None:
    """Draw the packages in rows; an arrow is an import."""
    figure, axes = new_canvas(8.0, 4.4)
    places = {
        "launch": (3.2, 3.75, GRAY),
        "rome.stages": (2.1, 2.95, BLUE),
        "rome.evals": (4.3, 2.95, BLUE),
        "rome.train": (0.3, 2.15, BLUE),
        "rome.rollout": (2.3, 2.15, BLUE),
        "envs.sources": (6.1, 2.95, GREEN),
        "envs.tasks, games,\nworlds, problems": (6.1, 2.15, GREEN),
        "rome.agent": (3.2, 1.35, BLUE),
        "envs.gem": (6.1, 1.35, GREEN),
        "rome.serve": (0.3, 0.55, ORANGE),
        "rome.engine": (4.1, 0.55, ORANGE),
        "rome.data,\nrome.losses, rome.model": (2.2, 0.55, BLUE),
        "envs.rock": (6.1, 0.55, GREEN),
    }
    for name, (x, y, colour) in places.items():
        box(axes, (x, y), (WIDTH, HEIGHT), colour)
        axes.text(
            x + WIDTH / 2,
            y + HEIGHT / 2,
            name,
            ha="center",
            va="center",
            fontsize=8 if "\n" in name else 9.5,
            fontweight="bold",
            linespacing=1.2,
        )
    imports = (
        ("launch", "rome.stages"),
        ("launch", "rome.evals"),
        ("rome.stages", "rome.train"),
        ("rome.stages", "rome.rollout"),
        ("rome.stages", "rome.evals"),
        ("rome.evals", "rome.rollout"),
        ("rome.evals", "envs.sources"),
        ("envs.sources", "envs.tasks, games,\nworlds, problems"),
        ("rome.rollout", "rome.agent"),
        ("rome.agent", "rome.engine"),
        ("rome.agent", "envs.gem"),
        ("envs.tasks, games,\nworlds, problems", "envs.gem"),
        ("envs.gem", "envs.rock"),
        ("rome.train", "rome.data,\nrome.losses, rome.model"),
    )
    for upper, lower in imports:
        start = (places[upper][0] + WIDTH / 2, places[upper][1])
        end = (places[lower][0] + WIDTH / 2, places[lower][1] + HEIGHT)
        if places[upper][1] == places[lower][1]:  # side by side
            middle = places[upper][1] + HEIGHT / 2
            start, end = (places[upper][0] + WIDTH, middle), (places[lower][0], middle)
        arrow(axes, start, end, colour=MUTED)
    arrow(axes, (1.92, 0.77), (2.2, 0.77), colour=MUTED)
    arrow(axes, (4.1, 0.77), (3.82, 0.77), colour=MUTED)
    axes.text(
        0.3,
        0.2,
        "Everything in rome may use rome.data, rome.losses and rome.model;"
        " envs imports nothing of rome and not JAX.",
        fontsize=8.5,
        color=MUTED,
    )
    save(figure, "layers.png")


if __name__ == "__main__":
    draw()
