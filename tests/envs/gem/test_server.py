"""The service over real HTTP: ROCK's calls, its closed set of errors, its limits; and the remote
environment behind it.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import time
import types

import aiohttp
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.games import GAMES
from envs.gem import core, format_tool_call, make, make_vec, register
from envs.gem.remote import RemoteEnv, RemoteEnvError
from envs.gem.server import PREFIX, GemService
from envs.gem.server_json import ERRORS
from envs.rock import AgentFault, SandboxConfig, SandboxError, sync

TOKEN = "a token of the test"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(core, "_registry", dict(core._registry))
    register("test/odd", "tests.envs.gem.worlds:Odd")
    register("test/counter", "tests.envs.gem.worlds:Counter")
    register("test/async", "tests.envs.gem.worlds:AsyncCounter")


@contextlib.contextmanager
def serving(token=TOKEN, app=None, **options):
    """The address of a service on ROCK's background loop; the service is `serving.service`."""
    options = {"call_seconds": 60.0, **options}
    service = GemService(token, **options) if app is None else None

    async def start():
        runner = web.AppRunner(service.standalone() if app is None else app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = sync.run(start(), 60)
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", service
    finally:
        sync.run(runner.cleanup(), 70)


def ask(url, method, body=None, *, token=TOKEN, data=None, verb="POST", path=None):
    """(status, answer) of one request."""

    async def request():
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        address = url + (path or f"{PREFIX}/{method}")
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.request(verb, address, json=body, data=data) as response,
        ):
            return response.status, json.loads(await response.read())

    return sync.run(request(), 120)


def code(answer):
    status, body = answer
    assert ERRORS[body["error"]["code"]] == status and body["error"]["message"]
    return body["error"]["code"]


def test_an_episode_in_rocks_words():
    with serving() as (url, _):
        status, made = ask(url, "make", {"env_id": "game/tower_of_hanoi"})
        assert status == 200 and set(made) == {"sandbox_id"}
        local = make("game/tower_of_hanoi")
        observation, info = local.reset(seed=4)
        assert ask(url, "reset", {**made, "seed": 4}) == (
            200,
            {"observation": observation, "info": json.loads(json.dumps(info))},
        )
        action = local.demonstrator_action()
        observation, reward, terminated, truncated, info = local.step(action)
        assert ask(url, "step", {**made, "action": action}) == (
            200,
            {
                "observation": observation,
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "info": json.loads(json.dumps(info)),
            },
        )
        assert ask(url, "close", made) == (200, made)
        assert (
            code(ask(url, "close", made))
            == code(ask(url, "step", {**made, "action": "x"}))
            == "unknown_instance"
        )
        for verb in ("GET", "POST"):
            status, listed = ask(url, "list", verb=verb)
            assert status == 200 and {*GAMES, "test/odd"} <= set(listed["env_id"])


def test_nobody_gets_in_without_the_token():
    with serving() as (url, service):
        for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "tökén"):
            for method in ("make", "list", "nowhere"):
                assert (
                    code(ask(url, method, {"env_id": "game/wordle"}, token=token)) == "unauthorized"
                )
        assert not service._instances
    with pytest.raises(ValueError, match="token"):
        GemService("")
    with serving(None, anonymous=True) as (url, _):
        assert ask(url, "make", {"env_id": "game/wordle"}, token=None)[0] == 200


@pytest.mark.parametrize(
    ("method", "body", "expected"),
    [
        ("make", {"env_id": "no/such"}, "unknown_env"),
        ("make", {}, "bad_request"),
        ("make", {"env_id": 3}, "bad_request"),
        ("make", [], "bad_request"),
        ("make", {"env_id": "game/wordle", "more": 1}, "bad_request"),
        ("make", {"env_id": "game/wordle", "kwargs": {"nonsense": 1}}, "bad_request"),
        ("make", {"env_id": "game/wordle", "kwargs": {"env_id": 1}}, "bad_request"),
        ("make", {"env_id": "game/wordle", "kwargs": {"max_turns": -1}}, "bad_request"),
        ("make", {"env_id": "test/odd", "kwargs": {"refuse": True}}, "bad_request"),
        ("reset", {"sandbox_id": "x"}, "unknown_instance"),
        ("reset", {"sandbox_id": None}, "bad_request"),
        ("reset", {"sandbox_id": "x", "seed": -1}, "bad_request"),
        ("reset", {"sandbox_id": "x", "seed": True}, "bad_request"),
        ("reset", {"sandbox_id": "x", "seed": 1 << 63}, "bad_request"),
        ("step", {"sandbox_id": "x"}, "bad_request"),
        ("step", {"sandbox_id": "x", "action": 1}, "bad_request"),
        ("nowhere", {}, "not_found"),
    ],
)
def test_wrong_requests_get_a_code(method, body, expected):
    with serving() as (url, _):
        assert code(ask(url, method, body)) == expected


def test_requests_that_are_no_requests_get_a_code():
    with serving(max_body_bytes=10_000) as (url, _):
        for data in (
            b"",
            b"\xff\xfe",
            b"{",
            b"[" * 5000,
            b'{"env_id": ' + b"9" * 9000 + b"}",
            b'{"env_id": "x"} more',
        ):
            assert code(ask(url, "make", data=data)) == "bad_request"
        assert code(ask(url, "make", data=b'{"env_id": "' + b"x" * 20_000 + b'"}')) == "too_large"
        assert code(ask(url, "make", verb="GET")) == "method_not_allowed"


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from(["env_id", "kwargs", "sandbox_id", "seed", "action", "call_id"])


@pytest.fixture(scope="module")
def long_lived():
    with serving() as (url, _):
        yield url


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    method=st.sampled_from(["make", "reset", "step", "close"]), body=st.dictionaries(FIELDS, JSON)
)
def test_any_json_gets_an_answer(long_lived, method, body):
    assert code(ask(long_lived, method, body)) not in ("internal", "env_error")


def test_what_an_environment_does_wrong_has_a_code_and_the_next_call_works():
    with serving() as (url, _):
        _, made = ask(url, "make", {"env_id": "test/odd"})
        ask(url, "reset", made)
        for action in ("raise", "nan", "object"):
            assert code(ask(url, "step", {**made, "action": action})) == "env_error"
        assert "KeyError" in ask(url, "step", {**made, "action": "raise"})[1]["error"]["message"]
        assert ask(url, "step", {**made, "action": "numbers"})[1]["info"] == {"x": 1.5, "s": [1, 2]}
        assert (
            code(
                ask(url, "step", {**ask(url, "make", {"env_id": "game/wordle"})[1], "action": "x"})
            )
            == "env_error"
        )  # not reset yet


def test_lost_sandboxes_are_infrastructures_fault(monkeypatch):
    def lost(*_):
        raise SandboxError("the host is gone")

    monkeypatch.setattr("tests.envs.gem.worlds.Odd.reset", lost)
    with serving() as (url, _):
        assert (
            code(ask(url, "reset", ask(url, "make", {"env_id": "test/odd"})[1])) == "infrastructure"
        )


def test_what_an_agent_did_to_its_sandbox_is_the_last_step_of_its_episode(monkeypatch):
    def broken(*_):
        raise AgentFault("2 processes survived SIGKILL for 10 s")

    with serving() as (url, _):
        made = ask(url, "make", {"env_id": "test/odd"})[1]
        monkeypatch.setattr("tests.envs.gem.worlds.Odd.step", broken)
        status, step = ask(url, "step", {**made, "action": "x"})
        assert (status, step["reward"], step["terminated"]) == (200, 0.0, True)
        assert step["info"]["ending"] == "failure" and "survived" in step["info"]["note"]
        monkeypatch.setattr("tests.envs.gem.worlds.Odd.reset", broken)  # nobody has acted yet
        assert code(ask(url, "reset", made)) == "infrastructure"


def test_calls_of_one_environment_wait_for_each_other_and_those_of_others_do_not():
    with serving() as (url, service):
        slow, quick = (ask(url, "make", {"env_id": "test/odd"})[1] for _ in range(2))
        env = service._instances[slow["sandbox_id"]].env

        async def at_once():
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
                order = []

                async def step(made, action, name):
                    async with http.post(
                        f"{url}{PREFIX}/step", json={**made, "action": action}
                    ) as response:
                        assert response.status == 200
                        order.append(name)

                first = asyncio.create_task(step(slow, "wait", "slow"))
                assert await asyncio.to_thread(env.waits.wait, 60)
                after = asyncio.create_task(step(slow, "x", "after"))
                await step(quick, "x", "quick")
                answered = list(order)
                env.go.set()
                await asyncio.gather(first, after)
                return answered

        assert sync.run(at_once(), 60) == ["quick"] and env.done == ["wait", "x"]


def test_an_environment_that_hangs_costs_its_client_only():
    with serving() as (url, service):
        _, made = ask(url, "make", {"env_id": "test/odd"})
        _, other = ask(url, "make", {"env_id": "test/odd"})
        env = service._instances[made["sandbox_id"]].env
        service._call_seconds = 0.3  # only for calls that hang: the others may take their time
        assert code(ask(url, "step", {**made, "action": "wait"})) == "timeout"
        service._call_seconds = 60.0
        assert env.waits.is_set() and not env.done, "the environment was waited for"
        assert code(ask(url, "step", {**made, "action": "x"})) == "unknown_instance"
        assert ask(url, "step", {**other, "action": "x"})[0] == 200
        assert not env.closed.wait(0.3), "it was closed in the middle of its step"
        env.go.set()
        assert env.closed.wait(60) and env.done == ["wait"]
        service._call_seconds = 0.3
        assert code(ask(url, "make", {"env_id": "test/odd", "kwargs": {"hang": 1.5}})) == "timeout"


def test_an_environment_that_is_closed_while_it_hangs_is_closed_after_its_step():
    with serving() as (url, service):
        _, made = ask(url, "make", {"env_id": "test/odd"})
        env = service._instances[made["sandbox_id"]].env
        service._call_seconds = 2.0
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            step = threads.submit(ask, url, "step", {**made, "action": "wait"})
            assert env.waits.wait(60)
            closing = threads.submit(ask, url, "close", made)
            assert closing.result()[0] == 200
            assert not env.closed.wait(2.3), "it was closed in the middle of its step"
            env.go.set()
            assert code(step.result()) == "timeout"
        assert env.closed.wait(60) and env.done == ["wait"]


def test_idle_environments_are_closed_and_the_number_is_bounded(monkeypatch):
    ahead = 0.0  # of the real clock, so that seconds of idleness take no time
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + ahead)
    monkeypatch.setattr("envs.gem.server.time", clock)
    with serving(idle_seconds=4.0, max_envs=2) as (url, service):
        made = [ask(url, "make", {"env_id": "test/odd"})[1] for _ in range(2)]
        closing = [instance.env for instance in service._instances.values()]
        assert code(ask(url, "make", {"env_id": "test/odd"})) == "too_many"
        for _ in range(200):  # longer than idle_seconds, but never idle
            ahead += 1.0
            assert ask(url, "step", {**made[1], "action": "x"})[0] == 200
            if closing[0].closed.wait(0.2):
                break
        assert closing[0].closed.is_set() and ahead > 4
        assert code(ask(url, "step", {**made[0], "action": "x"})) == "unknown_instance"
        assert ask(url, "make", {"env_id": "test/odd"})[0] == 200
    assert closing[1].closed.is_set()  # the end of the service


def test_only_what_is_allowed_can_be_made():
    with serving(allow=["game/wordle"]) as (url, _):
        assert ask(url, "list", verb="GET")[1] == {"env_id": ["game/wordle"]}
        assert code(ask(url, "make", {"env_id": "game/sokoban"})) == "unknown_env"
        assert ask(url, "make", {"env_id": "game/wordle"})[0] == 200


def test_a_repeated_call_is_no_second_turn():
    with serving() as (url, _):
        _, made = ask(url, "make", {"env_id": "test/counter"})
        ask(url, "reset", made)
        first = ask(url, "step", {**made, "action": "a", "call_id": "1"})
        assert ask(url, "step", {**made, "action": "a", "call_id": "1"}) == first
        assert (
            ask(url, "step", {**made, "action": "a", "call_id": "2"})[1]["observation"] == "a at 2"
        )


def test_it_stands_beside_other_routes():
    async def hello(_):
        return web.json_response({"hello": 1})

    app = web.Application()
    app.router.add_post("/apis/envs/sandbox/v1/start", hello)
    GemService(TOKEN).mount(app)
    with serving(app=app) as (url, _):
        assert ask(url, "", {}, path="/apis/envs/sandbox/v1/start", token=None) == (
            200,
            {"hello": 1},
        )
        assert ask(url, "make", {"env_id": "game/wordle"})[0] == 200


# -- the remote environment
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["game/sokoban", "test/async"])
def test_a_remote_environment_is_the_local_one(name):
    with serving() as (url, service):
        remote, local = RemoteEnv(url, name, TOKEN), make(name)
        assert remote.reset(seed=6) == local.reset(seed=6)
        for _ in range(3):
            action = local.sample_random_action()
            there, here = remote.step(action), local.step(action)
            there[4].pop("thread", None)
            assert there == here
        remote.close()
        remote.close()
        assert not service._instances
        with pytest.raises(RuntimeError, match="reset"):
            remote.step("x")
        assert remote.reset(seed=6)[0] == local.reset(seed=6)[0]
        remote.close()


def test_arguments_task_and_tools_come_along():
    with serving() as (url, _):
        remote = RemoteEnv(url, "game/sokoban", TOKEN, dim_room=[7, 7], num_boxes=2)
        _, info = remote.reset(seed=3)
        assert (
            info["suffix"].count("X") == 2
            and remote.task.name == "sokoban/3"
            and remote.task.family == "sokoban"
            and remote.tools == info["tools"]
        )
        twin = remote.spawn(num_boxes=1)
        assert twin.reset(seed=3)[1]["suffix"].count("X") == 1
        remote.close(), twin.close()


def test_a_sandboxed_task_behind_the_service():
    register(
        "test/terminal",
        "envs.tasks.terminal.env:TerminalEnv",
        family="count",
        sandbox_config=SandboxConfig(isolation="best_available"),
    )
    with serving() as (url, service):
        remote = RemoteEnv(url, "test/terminal", TOKEN)
        remote.reset(seed=3)
        observation, *_, info = remote.step(
            format_tool_call("bash", {"command": "echo $((6 * 7))"})
        )
        assert (observation, info["status"], remote.task.name) == ("42", "ok", "count/3")
        sandbox = next(iter(service._instances.values())).env._sandbox
        assert sandbox.is_alive()
        remote.close()
        assert not sandbox.is_alive()


def test_a_vector_of_remote_environments_runs_as_coroutines():
    with serving() as (url, _):
        register("test/remote", RemoteEnv, url=url, token=TOKEN)
        vector = make_vec(
            ["test/remote"] * 3,
            vec_kwargs=[{"remote_id": "game/wordle"}] * 3,
            async_mode=True,
            seed=1,
        )
        assert type(vector).__name__ == "AsyncioVectorEnv"
        assert [info["seed"] for info in vector.reset(seed=5)[1]] == [5, 6, 7]
        assert len(vector.step(["about"] * 3)[0]) == 3
        vector.close()


def test_after_idleness_reset_makes_it_anew_and_a_step_says_so():
    with serving() as (url, service):
        remote = RemoteEnv(url, "test/counter", TOKEN)
        remote.reset(seed=1)
        ask(url, "close", {"sandbox_id": remote._sandbox_id})
        with pytest.raises(RemoteEnvError) as error:
            remote.step("a")
        assert error.value.code == "unknown_instance" and isinstance(error.value, SandboxError)
        assert remote.reset(seed=1)[0] == "start 1" and len(service._instances) == 1
        remote.close()


def test_a_broken_connection_is_tried_again_and_counts_once():
    """The service hears the step, and its answer is lost twice."""
    lost = []

    @web.middleware
    async def lossy(request, handler):
        response = await handler(request)
        if request.path.endswith("step") and len(lost) < 2:
            lost.append(1)
            request.transport.close()
        return response

    app = web.Application(middlewares=[lossy])
    GemService(TOKEN).mount(app)
    with serving(app=app) as (url, _):
        remote = RemoteEnv(url, "test/counter", TOKEN)
        remote.reset(seed=1)
        assert remote.step("a")[0] == "a at 1" and len(lost) == 2
        remote.close()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b"no json", "protocol"),
        (200, b"[]", "protocol"),
        (200, b'{"sandbox_id": 5}', "protocol"),
        (200, b"[" * 100_000, "protocol"),
        (500, b"{}", "protocol"),
        (503, b'{"error": {"code": "os.system", "message": "x"}}', "protocol"),
        (503, b'{"error": {"code": ["infrastructure"]}}', "protocol"),
        (503, b'{"error": "infrastructure"}', "protocol"),
        (503, b'{"error": {"code": "infrastructure"}}', "infrastructure"),
        (302, b"{}", "protocol"),
        (200, b'"' + b"x" * (17 << 20) + b'"', "protocol"),
    ],
)
def test_a_hostile_service_is_an_error_of_the_closed_set(status, body, expected):
    async def answer(request):
        return web.Response(status=status, body=body, headers={"Location": "http://127.0.0.1:9/"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    with serving(app=app) as (url, _):
        remote = RemoteEnv(url, "game/wordle")
        with pytest.raises(RemoteEnvError) as error:
            remote.reset()
        assert error.value.code == expected
        remote.close()


def test_nobody_there_is_a_connection_error():
    remote = RemoteEnv("http://127.0.0.1:9", "game/wordle", TOKEN)
    with pytest.raises(RemoteEnvError) as error:
        remote.reset()
    assert error.value.code == "connection"
    remote.close()
