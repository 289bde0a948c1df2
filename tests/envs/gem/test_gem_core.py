"""The registry and the interface behave as code written for gem expects."""

import pytest

from envs.gem import Env, core, make, register, registered


class Echo(Env):
    def __init__(self, prefix="", seed=0):
        self.prefix, self.seed = prefix, seed

    def reset(self, seed=None):
        return f"{self.prefix}{seed}", {}

    def step(self, action):
        return action, 1.0, True, False, {}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(core, "_registry", dict(core._registry))


def test_make_builds_what_was_registered_and_names_it():
    register("echo/loud", Echo, prefix="!")
    env = make("echo/loud", seed=3)
    assert (env.env_id, env.prefix, env.seed) == ("echo/loud", "!", 3)
    assert env.unwrapped is env
    assert "echo/loud" in registered()


def test_arguments_of_make_override_the_registered_ones():
    register("echo/soft", Echo, prefix="a")
    assert make("echo/soft", prefix="b").prefix == "b"


def test_reset_takes_the_seed_by_position_and_by_keyword():
    env = Echo()
    assert env.reset(5) == env.reset(seed=5)


def test_a_textual_entry_point_is_imported_by_make_only():
    register("echo/late", "envs.nowhere.at_all:Echo")
    with pytest.raises(ImportError, match=r"envs\.nowhere"):
        make("echo/late")


def test_an_entry_point_without_that_name_is_an_import_error():
    register("echo/noname", "envs.gem.core:NoSuchEnv")
    with pytest.raises(ImportError, match="NoSuchEnv"):
        make("echo/noname")


def test_a_duplicate_id_is_refused():
    register("echo/once", Echo)
    with pytest.raises(ValueError, match="echo/once"):
        register("echo/once", Echo)


def test_an_unknown_id_is_refused_and_its_neighbours_are_named():
    register("echo/known", Echo)
    with pytest.raises(ValueError, match="echo/known"):
        make("echo/unknown")


def test_a_malformed_entry_point_is_refused_at_once():
    with pytest.raises(ValueError, match=r"package\.module:Name"):
        register("echo/bad", "envs.gem.core.Env")
