r"""Tool-use worlds: a database, typed tools, a policy and a scripted user.

The outcome is the state of the database. Worlds need no sandbox. Importing envs.worlds registers
them.

env = make("rome:shop/hard", seed=17)
observation, info = env.reset()    # the policy and the user's first message; info["tools"]: schemas
env.step('<tool_call>\n{"name": "find_customer", "arguments": {...}}\n</tool_call>')
env.step("Could you tell me your ZIP code?")    # a turn without a call is a message to the user
"""

from envs.gem import register
from envs.worlds import gui, gui_scenarios, shop, shop_scenarios, travel, travel_scenarios
from envs.worlds.base import LEVELS, World, WorldEnv, WorldTask
from envs.worlds.scenario import Scenario

WORLDS = {
    "travel": World(
        "travel",
        travel.POLICY,
        travel.TOOLS,
        travel_scenarios.make_scenario,
        travel.random_write,
        max_turns=40,
    ),
    "shop": World(
        "shop",
        shop.POLICY,
        shop.TOOLS,
        shop_scenarios.make_scenario,
        shop.random_write,
        max_turns=50,
    ),
    "gui": World(
        "gui", gui.POLICY, gui.TOOLS, gui_scenarios.make_scenario, gui.random_write, max_turns=90
    ),
}


def make_world(world: str, **settings: object) -> WorldEnv:
    """Return the environment of a world by the world's name; settings are those of WorldEnv.

    Raises:
      ValueError: the world is unknown.
    """
    if world not in WORLDS:
        raise ValueError(f"world {world!r} is unknown; known: {', '.join(WORLDS)}")
    return WorldEnv(WORLDS[world], **settings)


WORLD_IDS = tuple(f"rome:{world}/{level}" for world in WORLDS for level in LEVELS)
for _world in WORLDS:
    for _level in LEVELS:
        register(f"rome:{_world}/{_level}", f"{__name__}:make_world", world=_world, level=_level)

__all__ = [
    "LEVELS",
    "WORLDS",
    "WORLD_IDS",
    "Scenario",
    "World",
    "WorldEnv",
    "WorldTask",
    "make_world",
]
