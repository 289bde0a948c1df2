"""Engines of a stage: whatever cannot be closed, the servers are stopped."""

import types

import pytest

from rome.stages.config import load_config
from rome.stages.engines import Engines
from rome.stages.rl import RLStage
from rome.train.team import Team


class Server:
    is_stopped = False

    def stop(self):
        self.is_stopped = True


class Pool:
    async def close(self):
        raise OSError("a socket")


def make(workdir, learner=None, chat=None):
    config = load_config("experiments/ipa.py", "smoke")
    return Engines(config, workdir, None, learner, chat, Team(), None)


def test_whatever_cannot_be_closed_the_servers_are_stopped(tmp_path):
    def close():
        raise TimeoutError("a sandbox")

    engines = make(tmp_path)
    engines._pool = Pool()
    engines.servers = [Server(), Server()]
    stage = types.SimpleNamespace(engines=engines, collector=types.SimpleNamespace(close=close))
    with pytest.raises((TimeoutError, OSError)):
        RLStage.close(stage)
    assert all(server.is_stopped for server in engines.servers)


def test_a_version_that_could_not_be_published_is_not_taken_for_published(tmp_path):
    class Unreachable:
        def score_one(self, *_):
            raise OSError("no space left on device")

    engines = make(tmp_path, Unreachable(), types.SimpleNamespace(open=lambda text: [1]))
    with pytest.raises(OSError):
        engines.publish(types.SimpleNamespace(step=1, params=None))
    assert engines.published is None


def test_engines_are_not_used_before_they_are_started(tmp_path):
    with pytest.raises(RuntimeError, match="before they are started"):
        make(tmp_path).lend(1)
