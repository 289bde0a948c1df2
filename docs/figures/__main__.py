"""Draws every picture of the documentation and writes the page of configuration keys.

python -m docs.figures      # needs pyte for the session in a terminal (tests/requirements-live.txt)
"""

from __future__ import annotations

from docs.figures import (
    async_timeline,
    chunk_credit,
    configuration,
    engine_states,
    games_curve,
    iflow_session,
    layers,
    learning_curve,
    noisy_training,
    outside_agent,
    pipeline,
    processes,
    relevance,
    safety_curve,
    sandbox_layers,
    speed,
)


def main() -> None:
    """Draw everything; curves of runs only where some are recorded."""
    processes.draw()
    layers.draw()
    engine_states.draw()
    sandbox_layers.draw()
    chunk_credit.draw()
    async_timeline.draw()
    relevance.draw()
    speed.draw()
    learning_curve.main([])
    games_curve.main([])
    outside_agent.main([])
    pipeline.main([])
    safety_curve.main([])
    noisy_training.main([])
    configuration.main([])
    iflow_session.draw()


if __name__ == "__main__":
    main()
