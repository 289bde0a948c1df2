"""The processes of a training run and the way of a sample: docs/images/processes.png.

python -m docs.figures.processes
"""

from __future__ import annotations

from docs.figures.style import BLUE, GRAY, GREEN, MUTED, ORANGE, arrow, box, new_canvas, save


def draw() -> None:
    """Draw trainer, engine and sandboxes with the seven steps of a sample."""
    figure, axes = new_canvas(8.0, 4.45)
    box(axes, (0.2, 0.4), (3.1, 3.85), GRAY, "Trainer process  (launch.train)")
    box(
        axes,
        (0.4, 2.95),
        (2.7, 0.93),
        BLUE,
        "Learner",
        "pack, score \u03c0_old, update, publish",
    )
    box(
        axes,
        (0.4, 0.6),
        (2.7, 1.6),
        BLUE,
        "Rollouts",
        "scheduler: groups, staleness bound\nplayer: one episode\nagent loop: owns the token ids",
    )
    box(
        axes,
        (5.0, 1.75),
        (2.8, 2.5),
        ORANGE,
        "Engine processes",
        "rome.serve (JAX), started for the run,\n"
        "or SGLang servers named by URL\n\n"
        "ids in; ids, logprobs and the\n"
        "version of the weights out\n\n"
        "serves only weights that it has proven",
    )
    box(
        axes,
        (5.0, 0.4),
        (2.8, 1.15),
        GREEN,
        "Sandboxes  (ROCK)",
        "one per episode: namespaces, no\nnetwork, limits on memory, processes,\ntime and disk",
    )
    arrow(axes, (3.1, 3.42), (5.0, 3.42), "7  new weights", colour=ORANGE, shift=(0, 0.12))
    arrow(axes, (3.1, 2.1), (5.0, 2.1), "1  token ids", shift=(0, 0.11))
    arrow(axes, (5.0, 1.8), (3.1, 1.8), "2  ids, logprobs, version", shift=(0.08, 0.11))
    arrow(axes, (3.1, 1.32), (5.0, 1.32), "3  tool call", shift=(0, 0.11))
    arrow(axes, (5.0, 1.02), (3.1, 1.02), "4  observation", shift=(0, 0.11))
    arrow(axes, (5.0, 0.72), (3.1, 0.72), "5  verdict: the reward", colour=GREEN, shift=(0, 0.11))
    arrow(axes, (0.8, 2.2), (0.8, 2.95), colour=BLUE)
    axes.text(
        0.92,
        2.58,
        "6  trajectory, on disk\n    before it counts",
        fontsize=8.5,
        color=BLUE,
        va="center",
        linespacing=1.35,
    )
    axes.text(
        0.2,
        0.17,
        "1 to 4 repeat for every turn, 5 ends the episode, 6 and 7 happen once a training step.",
        fontsize=8.5,
        color=MUTED,
        va="center",
    )
    save(figure, "processes.png")


if __name__ == "__main__":
    draw()
