"""Environments that know nothing of this project, for tests of sources."""

import random


class Countdown:
    """An environment with the methods of GEM and nothing else: no base class, bare infos."""

    max_turns = 4

    def reset(self, seed=None):
        self.left = random.Random(seed).randint(1, 3)
        return f"Count down from {self.left}.", {}

    def step(self, action):
        if action.strip() != str(self.left):
            return "wrong", 0.0, True, False, {}
        self.left -= 1
        return "go on", float(self.left == 0), self.left == 0, False, {}


class Endless(Countdown):
    """It does not say how many turns an episode has."""

    max_turns = None

    def step(self, action):
        return "go on", 0.25, False, False, {}


class Broken(Countdown):
    """It raises an error when it is stepped."""

    def step(self, action):
        raise KeyError("board")


class Shown(Countdown):
    """It brings a script."""

    def demonstrator_action(self):
        return str(self.left)


def frozen_lake():
    """Return an environment of gymnasium."""
    import gymnasium

    return gymnasium.make("FrozenLake-v1", render_mode="ansi", is_slippery=False)


def nothing():
    """Return no environment."""
    return 17


def fails():
    """Raise an error."""
    raise OSError("no board is left")


NO_CLASS = 3
