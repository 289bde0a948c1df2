"""An OpenAI-compatible server, a real one on this machine, that behaves and misbehaves: the model's
failures are its own, the server's are not.
"""

import asyncio
import json
import time

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.gem import parse_tool_calls
from envs.gem.tool_call import ToolCallError
from envs.sources import load_tasks
from rome.agent.endpoint import MAX_WAIT_SECONDS, retry_after
from rome.agent.loop import Limits
from rome.evals.endpoint import Endpoint, action_of
from rome.evals.policy import Policy
from tests.rome.evals.tasks import CONFIG, write_task
from tests.rome.rollout.worlds import CHAT, ScriptedEngine

KEY = "sk-very-secret"


def says(text=None, *commands, reason="stop", arguments=None):
    calls = [
        {
            "id": f"c{number}",
            "type": "function",
            "function": {
                "name": "bash",
                "arguments": arguments or json.dumps({"command": command}),
            },
        }
        for number, command in enumerate(commands)
    ]
    return web.json_response(
        {
            "choices": [
                {
                    "finish_reason": reason,
                    "message": {
                        "role": "assistant",
                        "content": text,
                        **({"tool_calls": calls} if calls else {}),
                    },
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3},
        }
    )


def fails(status, text="", **headers):
    return web.Response(
        status=status,
        text=text,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


class Answers:
    """Gives the answers one after the other, the last one for ever; keeps what was asked."""

    def __init__(self, *answers, delay=0.0):
        self.answers, self.delay, self.bodies, self.headers = list(answers), delay, [], []

    async def handle(self, request):
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        await asyncio.sleep(self.delay)
        make = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return make()


@pytest.fixture
def task(tmp_path):
    write_task(tmp_path, "task")
    return load_tasks(str(tmp_path))[0]


def play(task, answers, **options):
    async def session():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answers.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        agent = Endpoint(
            f"http://127.0.0.1:{port}/v1/",
            "m",
            CONFIG,
            **{"api_key": KEY, "first_wait_seconds": 0.01, **options},
        )
        try:
            return await agent.play(task, 0, seed=5)
        finally:
            await agent.close()
            await runner.cleanup()

    return asyncio.run(session())


@pytest.mark.parametrize("dataset", ["folder", "terminal:count:1", "games:frozen_lake:1"])
def test_policy_and_endpoint_are_told_the_same(task, dataset):
    if dataset != "folder":
        (task,) = load_tasks(dataset)
    answers = Answers(lambda: says("done"))
    play(task, answers)
    *system, opening = answers.bodies[0]["messages"]
    engine = ScriptedEngine(["done"] * 100)
    limits = Limits(max_context=4096, max_new_tokens=64)
    policy = Policy(engine, CHAT, limits, CONFIG, tell_tools=True)
    asyncio.run(policy.play(task, 0, seed=5))
    told = CHAT.tokenizer.decode(engine.requests[0][0], skip_special=False)
    for message in (*system, opening):
        assert message["content"] in told
    assert ("in a Linux shell" in told) is (dataset != "games:frozen_lake:1")
    for tool in answers.bodies[0]["tools"]:
        assert json.dumps(tool, ensure_ascii=False) in told


def test_it_solves_a_task_by_tool_calls_and_what_it_cost_is_counted(task):
    answers = Answers(lambda: says("I look", "ls", "echo hello > out.txt"), lambda: says("done"))
    outcome = play(task, answers, temperature=0.5)
    assert (outcome.reward, outcome.ending, outcome.turns, outcome.tokens) == (
        1.0,
        "success",
        3,
        {"prompt": 20, "completion": 6},
    )
    first, second = answers.bodies
    assert (
        first["model"] == "m"
        and first["temperature"] == 0.5
        and first["seed"] == 5
        and first["tools"][0]["function"]["name"] == "bash"
        and "max_tokens" not in first
    )
    assert second["messages"][:2] == first["messages"] and [
        message.get("tool_call_id") for message in second["messages"][2:]
    ] == [None, "c0", "c1"]
    assert answers.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [429, 503])
def test_back_pressure_is_waited_out_as_asked(task, status):
    answers = Answers(lambda: fails(status, "busy", Retry_After="0.3"), lambda: says("done"))
    began = time.monotonic()
    assert play(task, answers).ending == "failure"  # it did nothing and handed in
    assert len(answers.bodies) == 2 and time.monotonic() - began >= 0.3


def test_back_pressure_without_end_spoils_the_attempt_in_bounded_requests(task, monkeypatch):
    monkeypatch.setattr("rome.agent.endpoint.MAX_WAIT_SECONDS", 0.02)
    answers = Answers(lambda: fails(429, "busy"))
    outcome = play(task, answers)
    assert (outcome.reward, outcome.ending, outcome.permanent, len(answers.bodies)) == (
        None,
        "infra_engine",
        False,
        8,
    ) and "429" in outcome.note


def test_a_refused_key_is_tried_once_and_never_repeated(task):
    answers = Answers(lambda: fails(401, f"Incorrect API key provided: {KEY}"))
    outcome = play(task, answers)
    assert outcome.reward is None and outcome.permanent and len(answers.bodies) == 1
    assert (
        KEY not in repr(outcome)
        and "[key]" in outcome.note
        and KEY not in repr(Endpoint("http://h", "m", CONFIG, api_key=KEY))
    )


def test_a_redirect_does_not_carry_the_key_away(task):
    answers = Answers(lambda: fails(307, Location="http://127.0.0.1:1/v1/chat/completions"))
    outcome = play(task, answers)
    assert outcome.ending == "infra_engine" and "307" in outcome.note and len(answers.bodies) == 1


def test_a_slow_endpoint_is_no_failure_of_the_model(task):
    outcome = play(task, Answers(lambda: says("done"), delay=0.3), episode_seconds=0.2)
    assert (outcome.reward, outcome.ending) == (0.0, "failure")  # it had done nothing
    outcome = play(task, Answers(lambda: says("done"), delay=3.0), request_seconds=0.2)
    assert (outcome.reward, outcome.ending) == (None, "infra_engine") and "0.2 s" in outcome.note


def test_slow_commands_are(task):
    outcome = play(task, Answers(lambda: says(None, "sleep 600")), episode_seconds=0.5)
    assert (outcome.reward, outcome.ending) == (0.0, "timeout")


@pytest.mark.parametrize(
    "answer, options, ending",
    [
        (lambda: says("a", reason="length"), {}, "truncated_tokens"),
        (
            lambda: fails(400, '{"error": {"code": "context_length_exceeded"}}'),
            {},
            "truncated_tokens",
        ),
        (lambda: says(None, "sleep 600"), {"episode_seconds": 3.0}, "timeout"),
    ],
    ids=["turn", "context", "time"],
)
def test_a_finished_file_counts_whatever_ended_the_attempt(task, answer, options, ending):
    outcome = play(task, Answers(lambda: says(None, "echo hello > out.txt"), answer), **options)
    assert (outcome.reward, outcome.ending) == (1.0, ending)


@pytest.mark.parametrize(
    "answer, ending",
    [
        (lambda: says("a", reason="length"), "truncated_tokens"),
        (lambda: fails(400, '{"error": {"code": "context_length_exceeded"}}'), "truncated_tokens"),
        (lambda: says(None, "x", arguments="{not json"), "malformed"),
        (lambda: says(None, "x", arguments="[]"), "malformed"),
        (lambda: says(None, "x", arguments='{"cmd": "ls"}'), "malformed"),
    ],
)
def test_the_models_own_failures_earn_0(task, answer, ending):
    outcome = play(task, Answers(answer))
    assert (outcome.reward, outcome.ending) == (0.0, ending)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"choices": []}',
        '{"choices": [{"message": {"tool_calls": [{"id": 1}]}}]}',
        '{"choices": [{"message": null}]}',
        "[" * 5000,
    ],
)
def test_an_answer_that_is_none_spoils_the_attempt(task, text):
    outcome = play(task, Answers(lambda: fails(200, text)))
    assert (outcome.reward, outcome.ending) == (
        None,
        "infra_engine",
    ) and "no chat completion" in outcome.note


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=20))
def test_a_command_reaches_the_environment_as_it_was_said(command, tail):
    command += "</tool_call>" + tail
    (call,) = parse_tool_calls(
        action_of({"function": {"name": "bash", "arguments": json.dumps({"command": command})}})
    )
    assert (call.name, call.arguments) == ("bash", {"command": command})


@given(st.one_of(st.none(), st.text(max_size=30), st.floats().map(str), st.integers().map(str)))
def test_any_retry_after_is_a_bounded_wait(value):
    assert 0.0 <= retry_after(value) <= MAX_WAIT_SECONDS


@pytest.mark.parametrize(
    "url",
    ["ftp://h/v1", "http://", "h:80/v1", "https://user:secret@h/v1", "http://h/v1?key=secret"],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="endpoint is not") as error:
        Endpoint(url, "m", CONFIG)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("arguments", ["{", "5", "[" * 100_000, '{"a":' * 100_000], ids=range(4))
def test_arguments_that_are_no_json_object_are_a_malformed_call(arguments):
    turn = action_of({"function": {"name": "bash", "arguments": arguments}})
    with pytest.raises(ToolCallError):
        parse_tool_calls(turn)
