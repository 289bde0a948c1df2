"""Use the learner as a library: from a checkpoint directory to a real update on your own arrays.

python -m examples.learner_library [DIRECTORY]    # default: a tiny random checkpoint is written
"""

import sys
import tempfile

import jax
import optax

from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.losses import count_denominators
from rome.model.config import PRESETS
from rome.model.hf.checkpoint import save_hf
from rome.model.qwen3 import init_params
from rome.train.library import open_learner

if __name__ == "__main__":
    directory = sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp()
    if not sys.argv[1:]:
        params = jax.jit(init_params, static_argnums=0)(PRESETS["tiny"], jax.random.key(0))
        save_hf(params, PRESETS["tiny"], directory)

    answers = [([7, 8, 9], 1.0), ([7, 9, 9], 0.0)]  # what your engine sampled, and its rewards
    episodes = []
    for number, (sampled, reward) in enumerate(answers):
        turn = Chunk(prompt_ids=[1, 2, 3], action_ids=sampled, logprobs=[-6.6, -6.6, -6.6])
        ending = "success" if reward else "failure"
        episodes.append(Trajectory("ask", "own", [turn], reward, ending, episode=number))
    rows = pack(episodes, row_length=128, chunks_per_row=4, gamma=1.0, failure_reward=0.0)

    learner, state = open_learner(directory, "grpo", optax.adam(1e-4))
    [rows] = microbatches(rows, learner.mesh.size)  # filled up: the same number for each device
    rows = rows._replace(logp_old_BT=learner.score(state.params, [rows])[0])  # pi_old
    for step in range(3):
        rewarded = learner.score(state.params, [rows])[0][0, 3:6].sum()
        state, metrics = learner.update(state, [rows], count_denominators([rows]))
        print(f"update {step}: log p(rewarded) {rewarded:.3f}, loss {metrics['loss']:+.5f}")
