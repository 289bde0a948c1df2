"""A wish to stop is heard in every wait of a run, and ends it as stopped by the user."""

import asyncio
import subprocess
import threading

import pytest

from envs.rock import SandboxConfig
from rome.data.text import read_corpus
from rome.engine import process
from rome.engine.publish import Published
from rome.rollout.player import EpisodePlayer
from rome.stages import engines, isolation, players, sft
from rome.stages.config import load_config
from rome.stages.experiment import run, run_stages
from rome.stopping import Stopped, until_stopped
from rome.train.team import Team

GIVEN_UP_SECONDS = 30.0  # after which a wait has not heard the wish


class Wish(threading.Event):
    """The wish to stop of a user who gets impatient as soon as something hangs."""

    def hang(self, *_, **__):
        """Return a coroutine that hangs, and asks for the stop as it begins to."""

        async def hang():
            self.set()
            await asyncio.sleep(GIVEN_UP_SECONDS)
            raise AssertionError("the wish to stop was not heard")

        return hang()


@pytest.fixture
def wish():
    return Wish()


def at_the_publication(wish, monkeypatch):
    monkeypatch.setattr(engines, "publish_weights", wish.hang)


def at_an_evaluation(wish, monkeypatch):
    async def publish(*_, **__):
        return Published(0.0, 0.0, 1, ())

    monkeypatch.setattr(engines, "publish_weights", publish)
    monkeypatch.setattr(EpisodePlayer, "play_attempt", wish.hang)


def at_the_experts(wish, monkeypatch):
    monkeypatch.setattr(sft.SFTStage, "write_evaluation", write_nothing)
    monkeypatch.setattr(players, "collect_demonstrations", wish.hang)


def write_nothing(stage, step, state):
    stage.write_outcomes(step, {"tasks": []})


@pytest.mark.long
@pytest.mark.parametrize("waits", [at_the_publication, at_an_evaluation, at_the_experts])
def test_a_run_is_stopped_where_it_waits(waits, wish, monkeypatch, tmp_path):
    waits(wish, monkeypatch)
    config = load_config("experiments/sft.py", "smoke")
    config.engine.urls = "http://127.0.0.1:9"  # nothing is there
    assert run_stages(config, tmp_path / "run", "none", Team(stop=wish.is_set)) is False
    assert wish.is_set()


@pytest.mark.long
def test_a_run_is_stopped_while_its_engine_starts(wish, monkeypatch, tmp_path):
    launched = []

    def launch(model_dir, log_path, port, flags, environment):
        def start():
            return subprocess.Popen(["sleep", "600"], start_new_session=True)

        launched.append(process.ServerProcess("http://127.0.0.1:9", start(), log_path, start))
        wish.set()
        return launched[0]

    monkeypatch.setattr(process, "_launch", launch)
    config = load_config("experiments/sft.py", "smoke")
    assert run_stages(config, tmp_path / "run", "none", Team(stop=wish.is_set)) is False
    assert not launched[0].alive()


def test_a_run_is_stopped_while_a_remote_sandbox_starts(wish, monkeypatch, tmp_path):
    monkeypatch.setattr(isolation, "_tier_of", wish.hang)
    monkeypatch.setenv("ROCK_TOKEN", "x")
    config = load_config("experiments/sft.py", "smoke")
    config.sandbox.backend = "remote"
    config.sandbox.url = "http://127.0.0.1:9"
    assert run(config, tmp_path / "run", Team(stop=wish.is_set)) is False
    assert isinstance(isolation.find_isolation(SandboxConfig(), wish.is_set), str)


def test_a_run_is_stopped_while_it_reads_its_text(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) == 4

    with pytest.raises(Stopped):
        read_corpus(str(tmp_path), 0.3, should_stop)
    assert len(asked) == 4


def test_what_is_left_was_cancelled_and_could_clean_up():
    ends = []

    async def work():
        try:
            await asyncio.sleep(GIVEN_UP_SECONDS)
        finally:
            await asyncio.sleep(0)
            ends.append("closed")

    async def fail():
        raise ZeroDivisionError

    with pytest.raises(Stopped):
        asyncio.run(until_stopped(work(), lambda: True))
    assert ends == ["closed"]
    assert asyncio.run(until_stopped(asyncio.sleep(0, "done"), lambda: False)) == "done"
    with pytest.raises(ZeroDivisionError):
        asyncio.run(until_stopped(fail(), lambda: False))
