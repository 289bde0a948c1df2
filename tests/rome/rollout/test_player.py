"""The player: exact counts, nothing played twice, faults replaced, a stop keeps what ended."""

import asyncio
import collections
import contextlib
import dataclasses
import threading
import time

import pytest

from envs.gem import UnplayableTaskError
from rome.agent.iflow.episode import IFlowAgent
from rome.agent.loop import Limits
from rome.engine.errors import EngineError
from rome.rollout import player
from rome.rollout.accounting import Accounting
from rome.rollout.episode import Episode, RolloutError, SpoiledTaskError
from rome.rollout.player import EpisodePlayer
from tests.rome.rollout.worlds import CHAT, EchoEnv, ScriptedEngine

EPISODES = [
    Episode(f"copy/{number // 4}", number // 4, number % 4, seed=number) for number in range(12)
]


def make(engine=None, make_env=EchoEnv, **options):
    return EpisodePlayer(
        engine or ScriptedEngine(["red", "done"]),
        make_env,
        CHAT,
        Limits(300, 40, 5.0),
        **options,
    )


def play(scheduler, episodes=EPISODES, record=None, accounting=None, on_spoiled=None, **options):
    """Play all of them, some at once; tasks that cannot be played are told and left out."""
    counts = accounting or Accounting()

    async def play_one(episode):
        counts.begin()
        path = record(episode) if record else None
        try:
            return await scheduler.play_one(
                episode, temperature=1.0, accounting=counts, path=path, **options
            )
        except SpoiledTaskError as fault:
            if on_spoiled is None:
                raise
            on_spoiled(fault)

    async def play_all():
        return await asyncio.gather(*map(play_one, episodes))

    return [trajectory for trajectory in asyncio.run(play_all()) if trajectory is not None]


def test_a_finished_trajectory_is_on_disk_and_is_not_played_again(tmp_path):
    def record(episode):
        return tmp_path / f"{episode.seed}.json"

    engine, accounting = ScriptedEngine(["red", "done"]), Accounting()
    first = play(make(engine), EPISODES[:5], record=record)
    asked = len(engine.requests)
    second = play(make(engine), record=record, accounting=accounting)
    assert second[:5] == first
    assert len(engine.requests) - asked == 2 * 7
    assert accounting.started == accounting.in_flight == 12


def test_the_iflow_agent_plays_what_the_loop_plays():
    """The same engine, tasks and seeds: the same episodes, labels and replacements included."""
    loops, agents = (
        play(make(ScriptedEngine(["red", "blue", "done"]), iflow=iflow), routes=True)
        for iflow in (None, IFlowAgent())
    )
    for one in [*loops, *agents]:
        one.seconds = 0.0
        for chunk in one.chunks:
            chunk.routes = chunk.routes.tolist()
    assert agents == loops and len(agents) == len(EPISODES)


def test_the_loop_goes_on_while_files_are_written_and_read(tmp_path, monkeypatch):
    """It times the commands of all other episodes. The model's name is in the file."""
    in_loop = []

    def noted(function):
        def call(*args, **options):
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                in_loop.append(function.__name__)
            return function(*args, **options)

        return call

    for name in ("save_trajectory", "load_trajectory"):
        monkeypatch.setattr(player, name, noted(getattr(player, name)))
    for _ in range(2):
        played = play(
            make(model="tiny"), EPISODES[:2], record=lambda e: tmp_path / f"{e.seed}.json"
        )
        assert [trajectory.model for trajectory in played] == ["tiny", "tiny"]
    assert len(list(tmp_path.iterdir())) == 2 and not in_loop


def test_an_episode_that_is_cancelled_while_its_file_is_written_ends_after_that(
    tmp_path, monkeypatch
):
    writing, goes_on = threading.Event(), threading.Event()
    save = player.save_trajectory

    def slow_save(trajectory, path):
        writing.set()
        goes_on.wait(60)
        save(trajectory, path)

    monkeypatch.setattr(player, "save_trajectory", slow_save)

    async def cancel():
        path = tmp_path / "a.json"
        task = asyncio.create_task(
            make().play_one(EPISODES[0], temperature=1.0, accounting=Accounting(), path=path)
        )
        await asyncio.to_thread(writing.wait, 60)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert path.exists()

    asyncio.run(cancel())


def test_an_infrastructure_fault_is_replaced_with_another_seed_and_counted():
    made = collections.Counter()

    def make_env(name):
        made[name] += 1
        return EchoEnv(name, "infra_sandbox" if name == "copy/1" and made[name] == 1 else "success")

    accounting = Accounting()
    trajectories = play(make(make_env=make_env), accounting=accounting)
    assert all(t.ending == "success" for t in trajectories)
    assert (
        accounting.dropped == {"infra_sandbox": 1}
        and accounting.started == 13
        and accounting.in_flight == 12
    )
    assert sum(t.seed != e.seed for t, e in zip(trajectories, EPISODES, strict=True)) == 1
    accounting.check()


def test_a_task_that_is_always_spoiled_stops_the_run_with_its_cause():
    with pytest.raises(
        RolloutError, match="copy/2 was spoiled 3 times in a row, last as infra_verifier: why"
    ):
        play(
            make(
                make_env=lambda name: EchoEnv(
                    name, "infra_verifier" if name == "copy/2" else "success"
                )
            )
        )


@pytest.mark.parametrize("kind", ["ending", "task", "make"])
def test_a_task_that_cannot_be_played_is_left_out_where_that_is_allowed(kind, monkeypatch):
    monkeypatch.setattr(player, "RETRY_SECONDS", 0.0)

    class Broken(EchoEnv):
        async def areset(self, seed=None):
            raise UnplayableTaskError("task.toml:3: no such image")

    def make_env(name):
        if name != "copy/2":
            return EchoEnv(name)
        if kind == "make":
            raise UnplayableTaskError("task.toml:3: malformed")
        return Broken(name) if kind == "task" else EchoEnv(name, "infra_verifier")

    faults = []
    accounting = Accounting()
    played = play(make(make_env=make_env), accounting=accounting, on_spoiled=faults.append)
    assert [one.task for one in played] == ["copy/0"] * 4 + ["copy/1"] * 4
    assert {fault.task for fault in faults} == {"copy/2"} and len(faults) == 4
    ending = "infra_verifier" if kind == "ending" else "infra_sandbox"
    assert {fault.ending for fault in faults} == {ending} and all(fault.note for fault in faults)
    assert accounting.dropped == {ending: 8, "spoiled_task": 4} and accounting.in_flight == 8


def test_engines_that_fail_say_nothing_about_the_task(monkeypatch):
    monkeypatch.setattr(player, "RETRY_SECONDS", 0.0)
    engine = ScriptedEngine(["done"], error=EngineError("no engine is left"))
    with pytest.raises(RolloutError, match="no engine is left") as caught:
        play(make(engine), on_spoiled=pytest.fail)
    assert not isinstance(caught.value, SpoiledTaskError)


def test_an_episode_that_waits_before_it_is_played_again_is_in_flight(monkeypatch):
    monkeypatch.setattr(player, "RETRY_SECONDS", 60.0)
    accounting = Accounting()

    async def look():
        accounting.begin()
        spoiled = make(make_env=lambda name: EchoEnv(name, "infra_sandbox"))
        playing = spoiled.play_one(EPISODES[0], temperature=1.0, accounting=accounting)
        task = asyncio.create_task(playing)
        while not accounting.dropped:
            await asyncio.sleep(0.001)
        task.cancel()
        return accounting.to_json()

    assert asyncio.run(look())["in_flight"] == 1


def test_accounting_survives_json_and_forgets_what_was_in_flight():
    accounting = Accounting(10, 6, collections.Counter(timeout=1), 3)
    accounting.check()
    again = Accounting.from_json(accounting.to_json())
    assert (again.started, again.trained, again.dropped, again.in_flight) == (
        7,
        6,
        {"timeout": 1},
        0,
    )
    again.check()
    again.trained += 1
    with pytest.raises(AssertionError, match="does not add up"):
        again.check()


def test_a_file_of_another_task_or_anchor_or_one_that_was_cut_off_is_played_again(tmp_path):
    """A resumed run may give a name to another task: which comes next depends on what was finished
    when.
    """

    async def play(task, prefix=()):
        accounting = Accounting()
        accounting.begin()
        return await make().play_one(
            Episode(task, 0, 0, 1, "name", tuple(prefix)),
            temperature=1.0,
            accounting=accounting,
            path=tmp_path / "name.json",
        )

    first = asyncio.run(play("copy/1"))
    assert asyncio.run(play("copy/1")) == first
    other = [
        dataclasses.replace(
            first.chunks[0],
            action_ids=CHAT.turn("blue"),
            text="blue",
            observation="echo blue",
            logprobs=[0.0] * len(CHAT.turn("blue")),
        )
    ]
    assert [chunk.text for chunk in asyncio.run(play("copy/1", other)).chunks] == [
        chunk.text for chunk in first.chunks
    ]  # one from the beginning will do
    (tmp_path / "name.json").unlink()
    led = asyncio.run(play("copy/1", other))
    assert led.chunks[0].text == "blue"
    assert asyncio.run(play("copy/1", first.chunks[:1])).chunks[0].text == "red"
    led = asyncio.run(play("copy/1", first.chunks[:1]))
    assert [chunk.kind for chunk in led.chunks] == ["context", "rl"] and asyncio.run(
        play("copy/1", first.chunks[:1])
    ) == led
    assert asyncio.run(play("copy/2")).task == "copy/2"
    (tmp_path / "name.json").write_text((tmp_path / "name.json").read_text()[:100])
    assert asyncio.run(play("copy/2")).task == "copy/2"


def test_two_threads_may_count():
    accounting = Accounting()

    def count():
        for number in range(20_000):
            accounting.begin()
            accounting.drop(f"reason {number % 7}")

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        accounting.check()
    assert (accounting.started, accounting.in_flight, sum(accounting.dropped.values())) == (
        40_000,
        0,
        40_000,
    )


def test_a_prefix_that_is_answered_otherwise_each_time_does_not_end_the_run_but_is_left_out():
    async def play():
        source = await make().play_one(
            Episode("copy/1", 0, 0, 1), temperature=1.0, accounting=Accounting()
        )
        told = [dataclasses.replace(source.chunks[0], observation="Wed Nov 25 16:00:00 UTC")]
        accounting = Accounting()
        accounting.begin()
        return (
            await make().play_one(
                Episode("copy/1", 0, 0, 1, prefix=tuple(told)),
                temperature=1.0,
                accounting=accounting,
            ),
            accounting,
        )

    trajectory, accounting = asyncio.run(play())
    assert [chunk.kind for chunk in trajectory.chunks] == [
        "rl",
        "rl",
    ] and trajectory.ending == "success"
    assert accounting.to_json() == {
        "started": 3,
        "trained": 0,
        "dropped": {"infra_sandbox": 2},
        "in_flight": 1,
    }


def test_attempts_after_a_fault_are_apart_and_ever_further(monkeypatch):
    monkeypatch.setattr(player, "RETRY_SECONDS", 0.1)
    made = []

    def make_env(name):
        made.append(time.monotonic())
        return EchoEnv(name, "infra_sandbox" if len(made) < 3 else "success")

    play(make(make_env=make_env), EPISODES[:1])
    first, second, third = made
    assert second - first >= 0.1 and third - second >= 0.2
