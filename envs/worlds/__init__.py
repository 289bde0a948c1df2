"""Tool-use worlds: a database, typed tools, a policy, a scripted user, and an outcome that is the
state.

They need no sandbox.

env = make("rome:shop/hard", seed=17)     # importing envs.worlds registers them
observation, info = env.reset()           # the policy and the user's first words; info["tools"] has the schemas
env.step('<tool_call>\\n{"name": "find_customer", "arguments": {...}}\\n</tool_call>')
env.step("Could you tell me your ZIP code?")   # a turn without a call is a message to the user
"""

from envs.gem import register
from envs.worlds import gui, gui_scenarios, shop, shop_scenarios, travel, travel_scenarios
from envs.worlds.base import LEVELS, Scenario, World, WorldEnv, WorldTask

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
    """The environment of a world by its name; settings are WorldEnv's."""
    if world not in WORLDS:
        raise ValueError(f"world {world!r} is unknown; known: {', '.join(WORLDS)}")
    return WorldEnv(WORLDS[world], **settings)


WORLD_IDS = tuple(f"rome:{world}/{level}" for world in WORLDS for level in LEVELS)
for _name in WORLD_IDS:
    register(
        _name,
        f"{__name__}:make_world",
        world=_name.split(":")[1].split("/")[0],
        level=_name.split("/")[1],
    )

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
