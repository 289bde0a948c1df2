"""The user's own code in an experiment: loss, advantage, reward and filter, by their config keys.

| key | called as | returns |
|---|---|---|
| loss | (logp_BT, batch, config, denominators) | value and metrics, as every loss of rome.losses |
| advantage | (episodes, rewards), a group | for each episode a number, or one for each turn |
| reward | (episode) | the reward that training learns from |
| filter | (episodes), a group | the episodes to train on |

What a class declares as its fields are keys of the block config.own.ROLE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import ml_collections

from rome.data.advantages import PARAMETERS as COMPARISON_PARAMETERS
from rome.data.advantages import Comparison, Estimator
from rome.data.trajectory import Trajectory
from rome.losses import PARAMETERS as LOSS_PARAMETERS
from rome.losses import SPECS, Loss, build_loss, find_loss
from rome.own_code import (
    OwnCodeError,
    build,
    declared_keys,
    describe,
    digest,
    find,
    is_own,
    require_signature,
)
from rome.rollout.reward import Reward
from rome.train.workdir import ConfigError

Filter = Callable[[Sequence[Trajectory]], Sequence[Trajectory]]

ROLES: dict[str, tuple[str, ...]] = {  # and what each is called with
    "loss": LOSS_PARAMETERS,
    "advantage": COMPARISON_PARAMETERS,
    "reward": ("episode",),
    "filter": ("episodes",),
}
# What a key may name besides own code; "" is the default of all but the loss.
TABLES: dict[str, Sequence[str]] = {"loss": tuple(SPECS), "advantage": get_args(Estimator)}


def own_schema(config: ml_collections.ConfigDict, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block `own` of a schema with the keys that the config's own code declares.

    Raises:
      ConfigError: own code is not there, cannot be imported, or takes other arguments.
    """
    block = {}
    for role in schema["own"]:
        block[role] = _declared(role, config.get(role))
    return block


def _declared(role: str, name: Any) -> dict[str, Any]:
    """Return the keys that the code of a role declares, after a check of what its key names."""
    if not isinstance(name, str) or (not name and role != "loss"):
        return {}
    try:
        if role == "loss":
            return declared_keys(find_loss(name).function)
        found = find(name, {entry: entry for entry in TABLES.get(role, ())})
        if not is_own(name):
            return {}
        require_signature(found, ROLES[role])
        return declared_keys(found)
    except OwnCodeError as error:
        raise refusal(role, name, error) from None


def own_loss(config: ml_collections.ConfigDict) -> Loss:
    """Return the config's loss, with its own keys set."""
    return _built(config, "loss", lambda name, keys: build_loss(name, keys))


def own_advantage(config: ml_collections.ConfigDict) -> Estimator | Comparison:
    """Return how a step compares the episodes of a group: the config's way, or its loss's own."""
    name = config.advantage or find_loss(config.loss).advantage or "normalised"
    if not is_own(name):
        return name
    return _built(config, "advantage", _build)


def compares_episodes(config: ml_collections.ConfigDict) -> bool:
    """Return whether the config's loss learns from comparing the episodes of a group."""
    return find_loss(config.loss).advantage is not None


def own_reward(config: ml_collections.ConfigDict) -> Reward | None:
    """Return the reward that training learns from; None: the verifier's.

    The function that is returned raises OwnCodeError where own code fails.
    """
    if not config.reward:
        return None
    code = _built(config, "reward", _build)

    def reward(episode: Trajectory) -> float:
        with_name = f"config.reward={config.reward!r} failed for an episode of {episode.task}"
        try:
            value = float(code(episode))
        except Exception as error:
            raise OwnCodeError(f"{with_name}: {describe(error)}") from error
        if not math.isfinite(value):
            raise OwnCodeError(f"{with_name}: it returned {value}. Return a finite number")
        return value

    return reward


def own_filter(config: ml_collections.ConfigDict) -> Filter | None:
    """Return which episodes of a group are trained on; None: all of them.

    The function that is returned raises OwnCodeError where own code fails.
    """
    if not config.filter:
        return None
    code = _built(config, "filter", _build)

    def choose(episodes: Sequence[Trajectory]) -> list[Trajectory]:
        name = f"config.filter={config.filter!r}"
        try:
            kept = list(code(list(episodes)))
        except Exception as error:
            raise OwnCodeError(f"{name} failed: {describe(error)}") from error
        identities = {id(episode) for episode in kept}
        chosen = [episode for episode in episodes if id(episode) in identities]
        if len(chosen) != len(kept):
            raise OwnCodeError(
                f"{name} returned {len(kept)} episodes, {len(chosen)} of them of the"
                f" {len(episodes)} that it was given. Return some of these, each once"
            )
        return chosen

    return choose


def refusal(role: str, name: Any, error: BaseException) -> ConfigError:
    """Return the error of a config whose own code cannot be used; it names the key, once."""
    key = f"config.{role}={name!r}"
    text = str(error).rstrip(".")
    if text.startswith(f"{name!r} "):
        text = f"config.{role}={text}"
    text = text if text.startswith(key) else f"{key}: {text}"
    return ConfigError(text if text.endswith("?") else f"{text}.")


def own_code_digest(config: ml_collections.ConfigDict) -> str:
    """Return a hash of the files of the config's own code; all hosts must have the same."""
    return digest(config[role] for role in ROLES if is_own(config.get(role)))


def _build(name: str, keys: Mapping[str, Any]) -> Any:
    return build(find(name, {}), keys)


def _built(
    config: ml_collections.ConfigDict, role: str, make: Callable[[str, Mapping[str, Any]], Any]
) -> Any:
    name = config[role]
    keys = config.own[role].to_dict() if "own" in config else {}
    try:
        return make(name, keys)
    except OwnCodeError as error:
        raise refusal(role, name, error) from None
