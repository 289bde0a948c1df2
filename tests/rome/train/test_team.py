"""A team shares what its leader finds out, agrees on stopping, and ends together.

Threads stand for processes, a dictionary for the coordinator.
"""

import threading
import time

import pytest

from rome.stopping import Stopped
from rome.train import team as team_module
from rome.train.team import LeaderError, Team


class Store:
    """The coordinator's key-value store as jax.distributed's client has it."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values, f"{key} is set twice"
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: nobody has set it")
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            for name in [name for name in self.values if f"{name}/".startswith(f"{key}/")]:
                del self.values[name]

    def key_value_dir_get(self, prefix):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


class Refused(Exception):
    pass


@pytest.fixture
def teams(monkeypatch):
    """Makes the teams of `count` processes; whoever would end its process is noted in `left`
    instead.
    """
    monkeypatch.setattr(team_module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(team_module, "WAIT_MILLISECONDS", 20)
    made, left = [], []
    monkeypatch.setattr(
        Team, "_leave", lambda self, reason: (left.append(reason), time.sleep(0.05))
    )

    def make(count, stops=None):
        store = Store()
        made.extend(
            Team(
                index,
                count,
                store,
                stop=(stops or {}).get(index, lambda: False),
                errors=(Refused, Stopped),
            )
            for index in range(count)
        )
        return made

    make.left = left
    yield make
    for team in made:
        team.close()


def test_the_leader_names_those_that_said_nothing_when_all_leave(monkeypatch, capfd):
    monkeypatch.setattr(team_module, "LEAVING_SECONDS", 0.05)
    monkeypatch.setattr(team_module.os, "_exit", lambda status: None)
    store = Store()
    teams = [Team(index, 4, store) for index in range(4)]
    for team in teams:
        team.close()
    for index in (2, 0):
        teams[index]._leave("a collective broke")
    said = capfd.readouterr().err
    assert said.count("a collective broke; all processes end") == 2
    assert [number for number in range(4) if f"process {number} gave no sign of life" in said] == [
        1,
        3,
    ]


def in_each(teams, call):
    """call(team) in a thread for each process: what it returned or raised, in the order of the
    processes.
    """
    results = [None] * len(teams)

    def run(number):
        try:
            results[number] = call(teams[number])
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(teams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_everyone_gets_what_the_leader_made_and_only_the_leader_makes_it(teams):
    makers = []

    def call(team):
        first = team.share("first", lambda: makers.append(team.index) or {"pair": (1, 2.5)})
        return first, team.share("second", lambda: makers.append(team.index) or "text")

    assert in_each(teams(3), call) == [({"pair": [1, 2.5]}, "text")] * 3
    assert makers == [0, 0]


def test_alone_nothing_is_sent_and_the_value_is_the_makers_own():
    value = object()
    assert Team().share("anything", lambda: value) is value
    Team().part(ValueError("stays an ordinary error"))


def test_followers_wait_as_long_as_the_leader_takes(teams):
    assert in_each(teams(2), lambda team: team.share("slow", lambda: time.sleep(0.2) or 7)) == [
        7,
        7,
    ]


def test_what_the_leader_raises_all_raise_and_go_on_to_their_ends(teams):
    def fail():
        raise Refused("no more")

    def call(team):
        try:
            team.share("work", fail)
        except Refused as error:
            team.part(error)  # all raise it: nobody is ended
            return f"{type(error).__name__}: {error}", team.share("after", lambda: "saved")

    assert in_each(teams(3), call) == [("Refused: no more", "saved")] * 3
    assert teams.left == []


def test_an_unknown_kind_of_error_names_it(teams):
    _, error = in_each(teams(2), lambda team: team.share("work", lambda: {}["key"]))
    assert isinstance(error, LeaderError) and "process 0 raised KeyError: 'key'" in str(error)


def test_those_who_meet_go_on_together(teams):
    came = []

    def call(team):
        time.sleep(0.05 * team.index)
        came.append(team.index)
        team.meet("here")
        return len(came)

    assert in_each(teams(3), call) == [3, 3, 3]


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_stop_request_of_any_process_ends_a_meeting_that_one_does_not_come_to(teams, asked):
    is_asked = threading.Event()
    made = teams(3, {asked: is_asked.is_set})

    def call(team):
        if team.index == 2:
            is_asked.set()
        try:
            team.meet("files", is_ready=lambda: team.index != 1)
        except Stopped as error:
            team.part(error)  # all raise it: nobody is ended
            return team.share("after", lambda: "saved")

    assert in_each(made, call) == ["saved"] * 3 and teams.left == []


def test_a_meeting_that_one_does_not_come_to_names_it_and_the_remedy(teams):
    def call(team):
        team.meet("files of step 3", lambda: team.index != 1, 1.0, "is the disk shared?")

    for error in in_each(teams(3), call):
        assert isinstance(error, LeaderError)
        assert "files of step 3: process 1 of 3 did not come" in str(error)
        assert "is the disk shared?" in str(error)


def test_a_wish_to_stop_is_told_to_all_and_ends_a_process_that_has_nothing_to_save(teams):
    made = teams(3, {0: lambda: True})
    ends = time.monotonic() + 60
    while not all(team.wants_to_stop() for team in made) and time.monotonic() < ends:
        time.sleep(0.01)
    assert all(team.wants_to_stop() for team in made)
    made[2].part(Stopped())
    assert "process 2 of 3 was stopped before it had anything to save" in teams.left


def test_processes_at_different_places_are_an_error(teams):
    _, error = in_each(teams(2), lambda team: team.share(f"place {team.index}", lambda: 1))
    assert isinstance(
        error, LeaderError
    ) and "process 0 is at 'place 0', process 1 at 'place 1'" in str(error)


def test_other_rows_than_the_leaders_are_an_error_in_the_process_that_has_them(teams):
    results = in_each(
        teams(3), lambda team: team.require_same("rows of step 3", "b" if team.index == 2 else "a")
    )
    assert results[:2] == [None, None]
    assert isinstance(
        results[2], LeaderError
    ) and "rows of step 3: process 2 has b, process 0 a" in str(results[2])


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_stop_request_of_any_process_stops_all_at_the_same_turn(teams, asked):
    made = teams(3, {asked: lambda: True})

    def steps(team):
        for step in range(10_000):
            if team.should_stop():
                return step
            time.sleep(0.005)

    results = in_each(made, steps)
    assert results[0] is not None and len(set(results)) == 1
    assert made[0].wants_to_stop()


def test_an_error_of_one_process_alone_ends_all_with_its_name(teams):
    made = teams(3)
    made[1].part(OSError("disk full"))
    ends = time.monotonic() + 60
    while len(teams.left) < 3 and time.monotonic() < ends:
        time.sleep(0.01)
    assert len(teams.left) >= 3 and set(teams.left) == {"process 1 of 3 failed: OSError: disk full"}


def test_what_each_process_has_is_gathered_by_the_leader_and_added_up_for_all(teams):
    made = teams(3)
    gathered = in_each(made, lambda team: team.gather("position", {"row": team.index}))
    assert gathered == [[{"row": 0}, {"row": 1}, {"row": 2}], None, None]
    totals = in_each(made, lambda team: team.total("counts", [1, team.index, 0.5]))
    assert totals == [[3, 3, 1.5]] * 3
    assert in_each(made, lambda team: team.total("counts", [team.index])) == [[3]] * 3
    store = made[0]._client
    assert not store.key_value_dir_get(team_module.PARTS)  # the leader took them
    assert in_each(teams(1), lambda team: team.gather("x", 7))[-1] == [7]
    assert Team().total("x", [1, 2]) == [1, 2]
