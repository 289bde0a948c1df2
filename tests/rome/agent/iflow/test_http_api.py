"""A session over HTTP, driven by a client that reads its stream."""

import asyncio
import contextlib
import json

from aiohttp import ClientSession, web

from rome.agent.iflow import events
from rome.agent.iflow.protocols.http_api import SessionApi
from tests.rome.agent.iflow.opened import FolderOpener

TOKEN = "secret"


class Client:
    """Requests to the session, and the events that its stream has brought."""

    def __init__(self, url, http):
        self.url = url
        self.http = http
        self.seen = []
        self.news = asyncio.Event()

    async def post(self, name, **given):
        async with self.http.post(f"{self.url}/{name}", json=given) as answer:
            return answer.status, await answer.json()

    async def state(self):
        async with self.http.get(f"{self.url}/state") as answer:
            return await answer.json()

    async def follow(self, after=-1):
        async with self.http.get(f"{self.url}/events?after={after}") as answer:
            async for line in answer.content:
                if line.startswith(b"data: "):
                    self.seen.append(json.loads(line[6:]))
                    self.news.set()

    async def wait_for(self, kind):
        """Return the next event of a kind, and forget those before it."""
        async with asyncio.timeout(20):
            while True:
                while self.seen:
                    event = self.seen.pop(0)
                    if event["kind"] == kind:
                        return event
                self.news.clear()
                await self.news.wait()


@contextlib.asynccontextmanager
async def served(folder):
    session = await FolderOpener(folder / "sessions").open(str(folder))
    runner = web.AppRunner(SessionApi(session, TOKEN).application(), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        client = Client(url, http)
        following = asyncio.create_task(client.follow())
        try:
            yield client, session
        finally:
            following.cancel()
            await session.close()
            await runner.cleanup()


def play(body, folder):
    async def run():
        async with served(folder) as (client, session):
            await body(client, session)

    asyncio.run(run())


def test_a_call_is_approved_a_question_answered_and_an_answer_judged(tmp_path):
    async def body(client, session):
        write = 'call write_file {"path": "a", "content": "x"}'
        ask = 'call ask_user {"question": "Which?", "choices": ["red"]}'
        assert await client.post("prompt", text=f"{write}\n{ask}\nsay done") == (200, {})
        asked = await client.wait_for("approval_requested")
        assert asked["summary"] == "Write a" and "+x" in asked["diff"]
        state = await client.state()
        assert state["is_working"] and state["waiting"][0]["request"] == asked["request"]
        answer = {"request": asked["request"], "decision": "allow"}
        assert await client.post("approve", **answer) == (200, {})
        assert (await client.post("approve", **answer))[0] == 409  # it is answered already
        question = await client.wait_for("question_asked")
        await client.post("answer", request=question["request"], answer="red")
        finished = await client.wait_for("tool_finished")
        assert finished["output"] == "the user says red"
        said = await client.wait_for("assistant_message")
        assert said["text"] == "done" and (tmp_path / "a").read_text() == "x"
        given = {"target": said["number"], "verdict": "correct", "text": "It is written."}
        assert await client.post("feedback", **given) == (200, {})
        feedback = session.agent.log.events[-1]
        assert isinstance(feedback, events.FeedbackGiven) and feedback.text == "It is written."

    play(body, tmp_path)


def test_a_turn_is_steered_and_cancelled_and_the_stream_is_taken_up_again(tmp_path):
    async def body(client, session):
        await client.post("prompt", text="slow " + "word " * 200)
        await client.wait_for("text_delta")
        await client.post("prompt", text="say steered")
        await client.post("cancel")
        assert (await client.wait_for("turn_finished"))["outcome"] == "aborted"
        assert (await client.post("mode", mode="plan")) == (200, {})
        last = len(session.agent.log.events)
        await client.post("prompt", text="say next")
        await client.wait_for("turn_finished")
        again = Client(client.url, client.http)
        following = asyncio.create_task(again.follow(after=last - 1))
        assert (await again.wait_for("turn_started"))["number"] == last
        following.cancel()

    play(body, tmp_path)


def test_wrong_requests_are_refused_by_name(tmp_path):
    async def body(client, session):
        for name, given, status, said in [
            ("prompt", {}, 400, "text must be a text"),
            ("prompt", {"text": "/nothing"}, 400, "no command /nothing"),
            ("mode", {"mode": "wild"}, 400, "mode must be one of"),
            ("approve", {"request": "x", "decision": "perhaps"}, 400, "decision"),
            ("approve", {"request": "x", "decision": "allow"}, 409, "no approval 'x' waits"),
            ("answer", {"request": "x", "answer": "y"}, 409, "no question 'x' waits"),
            ("feedback", {"target": 0, "verdict": "accept"}, 400, "not the number of an answer"),
            ("feedback", {"target": True, "verdict": "accept"}, 400, "not the number"),
        ]:
            found, answer = await client.post(name, **given)
            assert found == status and said in answer["error"], (name, given, answer)
        async with client.http.post(f"{client.url}/cancel", data=b"[1") as answer:
            assert answer.status == 400
        async with ClientSession() as stranger:
            for path in ("state", "events"):
                async with stranger.get(f"{client.url}/{path}") as answer:
                    assert answer.status == 401
            async with stranger.post(f"{client.url}/prompt", json={"text": "say x"}) as answer:
                assert answer.status == 401

    play(body, tmp_path)
