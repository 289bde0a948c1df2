"""The agent on a policy: what it answers is recorded with its exact tokens."""

import asyncio

import pytest

from rome.agent.dialogue import Dialogue
from rome.agent.iflow.dialogue_model import DialogueModel
from rome.agent.iflow.events import EventLog
from rome.agent.iflow.loop import Agent
from rome.agent.session import Session
from rome.engine.completion import Completion
from rome.engine.errors import EngineFailed
from rome.model.tokenizer import Chat
from rome.stages.tokens import tiny_tokenizer
from tests.rome.agent.iflow.doubles import Folder, Note, Shortener

CALL = '<tool_call>\n{"name": "note", "arguments": {"text": "a"}}\n</tool_call>'
