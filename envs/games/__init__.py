"""Text games: small seeded worlds without a sandbox, each of which a scripted demonstrator wins.

env = make("game/frozen_lake", seed=17)     # importing envs.games registers them
observation, info = env.reset()
env.step(env.demonstrator_action())
"""

from envs.games.bare import BareFrozenLake, BareSokoban
from envs.games.base import GameTask, TextGame
from envs.games.frozen_lake import FrozenLake
from envs.games.guess_the_number import GuessTheNumber
from envs.games.sokoban import Sokoban
from envs.games.tower_of_hanoi import TowerOfHanoi
from envs.games.wordle import Wordle
from envs.gem import register

GAMES: dict[str, tuple[type[TextGame], dict]] = {
    "game/frozen_lake": (FrozenLake, {}),
    "game/frozen_lake-8x8": (FrozenLake, {"size": 8, "max_turns": 30}),
    "game/frozen_lake-slippery": (FrozenLake, {"is_slippery": True, "max_turns": 100}),
    "game/sokoban": (Sokoban, {}),  # ROLL's SimpleSokoban
    "game/sokoban-8x8": (Sokoban, {"dim_room": (8, 8), "num_boxes": 2, "max_turns": 40}),
    "game/sokoban-10x10": (Sokoban, {"dim_room": (10, 10), "num_boxes": 4, "max_turns": 100}),
    "game/guess_the_number": (GuessTheNumber, {}),
    "game/wordle": (Wordle, {}),
    "game/tower_of_hanoi": (TowerOfHanoi, {}),
    "game/tower_of_hanoi-5": (TowerOfHanoi, {"num_disks": 5}),
    # for tiny models (experiments/ipa.py:games): boards and turns of ROLL's agentic examples
    "game/frozen_lake-bare": (BareFrozenLake, {"max_turns": 10}),
    "game/sokoban-bare": (BareSokoban, {"max_turns": 10}),
}

for _name, (_kind, _settings) in GAMES.items():
    register(_name, f"{_kind.__module__}:{_kind.__name__}", **_settings)

__all__ = [
    "GAMES",
    "BareFrozenLake",
    "BareSokoban",
    "FrozenLake",
    "GameTask",
    "GuessTheNumber",
    "Sokoban",
    "TextGame",
    "TowerOfHanoi",
    "Wordle",
]
