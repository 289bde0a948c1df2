"""Scripts over the worlds, for tests."""

from envs.worlds.scenario import format_call


def play(env, actions, seed=None):
    """(reward, last info, all observations) of the actions, then of "done" until the end."""
    opening, _ = env.reset(seed)
    seen, actions = [opening], iter(actions)
    while True:
        observation, reward, terminated, truncated, info = env.step(next(actions, "done"))
        seen.append(observation)
        if terminated or truncated:
            return reward, info, seen


def demonstrate(env, seed=None):
    env.reset(seed)
    return play(env, env.scenario.demonstration, seed)


def calls(*made):
    return [format_call(one) for one in made]
