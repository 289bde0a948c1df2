"""Agents that are put together from doubles: making one, playing a turn, reading its log."""

import asyncio

from rome.agent.iflow import events
from rome.agent.iflow.desk import Desk
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.loop import Agent
from tests.rome.agent.iflow.doubles import Folder, Note, ScriptedModel


def make(*steps, tools=(), log=None, is_attended=False, **options):
    log = log or EventLog()
    desk = Desk(log, is_attended=is_attended)
    model = ScriptedModel(*steps)
    tools = tools or [Note()]
    return Agent(model, tools, log, Folder(), desk=desk, **options), model


def play(agent, text="do it"):
    return asyncio.run(asyncio.wait_for(agent.run(text), 60))


def of(agent, kind):
    return [event for event in agent.log.events if isinstance(event, kind)]


def results(agent):
    return [(done.status, done.output) for done in of(agent, events.ToolFinished)]


def told(agent, source):
    return [said.text for said in of(agent, events.UserMessage) if said.source == source]
