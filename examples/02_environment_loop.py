"""Play episodes of an environment.

python -m examples.02_environment_loop

The loop is GEM's: reset, then step until the episode is over. The player guesses by bisection; put
a language model in its place.
"""

import envs.games  # noqa: F401  (registers game/*)
from envs.gem import Env, make


def play(env: Env, seed: int) -> tuple[float, int]:
    """Return the reward and the number of turns of one episode."""
    observation, _ = env.reset(seed=seed)
    low = 1
    high = 100
    turns = 0
    while True:
        guess = (low + high) // 2
        action = f"<answer>{guess}</answer>"
        observation, reward, terminated, truncated, _ = env.step(action)
        turns += 1
        if terminated or truncated:
            return reward, turns
        if "higher" in observation:
            low = guess + 1
        else:
            high = guess - 1


if __name__ == "__main__":
    env = make("game/guess_the_number")
    for seed in range(5):
        reward, turns = play(env, seed)
        print(f"seed {seed}: reward {reward} after {turns} turns")
    env.close()
