"""What chunk-level credit changes, computed by the losses themselves: docs/images/chunk_credit.png.

One success and one failure of three turns each. The bars are the weights that the losses give to
the gradient of every sampled token's log-probability.

python -m docs.figures.chunk_credit
"""

from __future__ import annotations

import jax
import numpy as np

from docs.figures.style import BLUE, GRAY, INK, MUTED, ORANGE, RED, new_figure, save
from rome.data.batch import Batch
from rome.data.packing import pack
from rome.data.trajectory import Chunk, Trajectory
from rome.losses import LOSSES, LossConfig, count_denominators

GAMMA = 0.8  # smaller than the default 0.95, so that the discount is visible over three chunks
LENGTHS = (6, 9, 5)  # sampled tokens of each turn
READ = 3  # tokens that the environment appends before each turn


def episode(reward: float) -> Trajectory:
    """Return an episode of three turns whose tokens have invented ids."""
    chunks = [
        Chunk(
            prompt_ids=[1] * READ,
            action_ids=[2] * length,
            logprobs=[-1.0] * length,
            versions=[(0, 0, length)],
        )
        for length in LENGTHS
    ]
    ending = "success" if reward > 0 else "failure"
    return Trajectory("task", "family", chunks, reward, ending)


def make_batch(reward: float) -> tuple[Batch, np.ndarray]:
    """Return a batch of one episode and the policy's current log-probabilities.

    The policy has moved since it sampled: the tokens of the second chunk became less likely, those
    of the third more likely.
    """
    batch = pack(
        [episode(reward)],
        row_length=sum(LENGTHS) + READ * len(LENGTHS),
        chunks_per_row=len(LENGTHS),
        gamma=GAMMA,
        failure_reward=-1.0,
    )
    batch = batch._replace(logp_old_BT=batch.logp_rollout_BT)
    moved_C = np.array([0.0, -0.6, 0.4])
    shift_BT = np.where(batch.action_mask_BT, moved_C[np.maximum(batch.chunk_ids_BT, 0)], 0.0)
    return batch, (batch.logp_rollout_BT + shift_BT).astype(np.float32)


def token_weights(loss: str, reward: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss's weight of every token, [T], and which tokens were sampled, [T]."""
    batch, logp_BT = make_batch(reward)
    denominators = count_denominators([batch])

    def value(logp_BT: jax.Array) -> jax.Array:
        return LOSSES[loss](logp_BT, batch, LossConfig(), denominators)[0]

    gradient_BT = np.asarray(jax.grad(value)(logp_BT))
    return -gradient_BT[0] * denominators.rl_tokens, batch.action_mask_BT[0]


def draw() -> None:
    """Draw both losses for a success and for a failure."""
    figure, grid = new_figure(8.0, 4.3, nrows=2, ncols=2, sharex=True, sharey="row")
    columns = (("token_level", "Token level (Eq. 4-6)"), ("ipa", "Chunk level: IPA (Eq. 7-10)"))
    for row, (reward, what) in enumerate(((1.0, "success, R = 1"), (-1.0, "failure, R = -1"))):
        for column, (loss, title) in enumerate(columns):
            axes = grid[row][column]
            weights_T, sampled_T = token_weights(loss, reward)
            places = np.arange(len(weights_T))
            colour = BLUE if reward > 0 else RED
            axes.bar(places[sampled_T], weights_T[sampled_T], width=0.8, color=colour)
            axes.bar(places[~sampled_T], np.zeros((~sampled_T).sum()), width=0.8, color=GRAY)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set_ylim((0, 1.25) if reward > 0 else (-1.25, 0))
            axes.grid(axis="x", visible=False)
            if row == 0:
                axes.set_title(title)
            if column == 0:
                axes.set_ylabel(f"{what}\nweight of the token")
            start = 0
            for number, length in enumerate(LENGTHS, 1):
                axes.axvspan(start - 0.5, start + READ - 0.5, color="#eef1f4", zorder=0)
                middle = start + READ + length / 2 - 0.5
                if row == 0:
                    axes.text(middle, 1.19, f"$c_{number}$", ha="center", va="top", color=MUTED)
                start += READ + length
            if row == 1:
                axes.set_xlabel("token (gray: appended by the environment)")
    grid[1][1].annotate(
        "less likely since sampling:\nthe failure's weight fades",
        xy=(13, -0.43),
        xytext=(13, -0.92),
        ha="center",
        fontsize=8,
        color=ORANGE,
        arrowprops={"arrowstyle": "-|>", "color": ORANGE},
    )
    save(figure, "chunk_credit.png")


if __name__ == "__main__":
    draw()
