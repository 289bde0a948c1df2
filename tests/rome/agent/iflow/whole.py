"""Plays turns of the whole agent, put together as for users, against a scripted endpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib

from rome.agent.iflow import events
from rome.agent.iflow.assemble import assemble
from rome.agent.iflow.options import Options
from rome.agent.iflow.sessions import SessionStore
from tests.rome.agent.iflow.scripted import ScriptedEndpoint

SECONDS = 60


@dataclasses.dataclass
class Played:
    """What happened: events of the session, ends of the turns, what the endpoint was asked."""

    events: list[events.Event]
    ends: list[events.TurnFinished]
    requests: list[dict]
    folder: pathlib.Path

    def of(self, kind):
        """Return the events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def outputs(self) -> list[str]:
        """Return the results of calls, in the order of the model's calls."""
        found = {event.call_id: event.output for event in self.of(events.ToolFinished)}
        said = self.of(events.AssistantMessage)
        return [found[call.id] for message in said for call in message.tool_calls]

    @property
    def statuses(self) -> list[str]:
        """Return the statuses of calls, in the order of the model's calls."""
        found = {event.call_id: event.status for event in self.of(events.ToolFinished)}
        said = self.of(events.AssistantMessage)
        return [found[call.id] for message in said for call in message.tool_calls]

    def told(self, source):
        """Return the texts that the model read as the user's, of a source."""
        return [said.text for said in self.of(events.UserMessage) if said.source == source]


class Whole:
    """A project and a home of their own.

    Attributes:
      project: folder of the project.
      home: of the user.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.project = folder / "project"
        self.home = folder / "home"
        self.project.mkdir()
        self.home.mkdir()
        self.store = SessionStore(self.project, self.home / ".iflow" / "sessions")

    def write(self, name: str, text: str | dict) -> pathlib.Path:
        """Write a file of the project, or of the home where its name begins with ~/."""
        path = self.home / name[2:] if name.startswith("~/") else self.project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return path

    def play(self, answers, *prompts, during=None, session=None, attended=False, **options):
        """Play a turn for each prompt; `during(assembled)` runs beside the first one."""
        settings = {"workspace": "host", "mode": "yolo"} | options

        async def steps(url) -> Played:
            opened = self.store.new() if session is None else self.store.open(session)
            given = Options(**({"directory": self.project, "base_url": url} | settings))
            whole = await assemble(given, opened, is_attended=attended, home=self.home)
            ends = []
            try:
                for number, prompt in enumerate(prompts or ("do it",)):
                    if callable(prompt):
                        await prompt(whole)
                        continue
                    beside = None
                    if during is not None and number == 0:
                        beside = asyncio.create_task(during(whole))
                    ends.append(await whole.agent.run(prompt))
                    if beside is not None:
                        await beside
            finally:
                await whole.close()
            log = whole.agent.log
            return Played(list(log.events), ends, endpoint.requests, opened.folder)

        with ScriptedEndpoint(answers) as endpoint:
            return asyncio.run(asyncio.wait_for(steps(endpoint.url), SECONDS))


__all__ = ["Played", "Whole"]
