"""The nested layers around an agent's command: docs/images/sandbox_layers.png.

python -m docs.figures.sandbox_layers
"""

from __future__ import annotations

from docs.figures.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, arrow, box, new_canvas, save


def draw() -> None:
    """Draw the layers of the embedded backend, from the host to the command."""
    figure, axes = new_canvas(8.0, 4.5)
    box(axes, (0.2, 0.25), (7.6, 4.05), GRAY, "Host: trainer, verifier scripts, your files")
    box(
        axes,
        (0.45, 0.45),
        (5.15, 3.5),
        BLUE,
        "cgroup: memory, processes, CPU",
    )
    box(
        axes,
        (0.68, 0.62),
        (4.7, 3.0),
        PURPLE,
        "namespaces: user, mount, pid, network, IPC, UTS, cgroup",
        "read-only /usr, a few files of /etc; no host path, no capability,\n"
        "no id that owns anything outside",
        title_size=9.5,
    )
    box(
        axes,
        (0.9, 0.78),
        (4.25, 1.95),
        GREEN,
        "seccomp filter + rlimits",
        "allowed system calls only; open files, file size, core dumps",
        title_size=9.5,
    )
    box(
        axes,
        (1.12, 0.94),
        (1.85, 1.15),
        ORANGE,
        "command of the agent",
        "bash in /workspace,\nlimited in size",
        title_size=9,
    )
    box(
        axes,
        (3.12, 0.94),
        (1.85, 1.15),
        GRAY,
        "verifier",
        "after the agent's last\nprocess is dead; fresh\nnamespaces",
        title_size=9,
    )
    box(
        axes,
        (5.85, 2.35),
        (1.75, 1.5),
        RED,
        "egress guard",
        "records every attempt;\nrelays only what\nSandboxConfig.egress\ngrants",
        title_size=9.5,
        text_size=8,
    )
    box(
        axes,
        (5.85, 0.62),
        (1.75, 1.25),
        GRAY,
        "network",
        "unreachable unless\ngranted by name\nand port",
        title_size=9.5,
        text_size=8,
    )
    arrow(axes, (5.38, 3.0), (5.85, 3.0), colour=RED)
    arrow(axes, (6.7, 2.35), (6.7, 1.87), colour=RED)
    save(figure, "sandbox_layers.png")


if __name__ == "__main__":
    draw()
