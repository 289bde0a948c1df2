"""The tree of one episode's messages, and the calls that are open in it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from rome.agent.messages import Message, Reply
from rome.model.tokenizer import Chat

Limits = tuple[int | None, float | None]  # max_new_tokens and temperature of a call


@dataclasses.dataclass(eq=False)
class Node:
    """A message in the tree.

    Args:
      message: None at a root.
      above: the node of the message before it; None at a root.
      chat: at a root: writes messages below its tools and its system text.
      chunk: number of the chunk where it was sampled.
      reply: where it was sampled.
      limits: that it was sampled with.
      children: messages that others wrote after it, by their keys.
      answers: that were sampled after it, in the order of time.
      open: calls for one more.
      changes: sets of changes in which it came back, each counted once.
      is_followed: whether the conversation went on from it.
    """

    message: Message | None
    above: Node | None
    chat: Chat | None = None
    chunk: int | None = None
    reply: Reply | None = None
    limits: Limits = (None, None)
    children: dict[tuple[str, ...], Node] = dataclasses.field(default_factory=dict)
    answers: list[Node] = dataclasses.field(default_factory=list)
    open: list[OpenCall] = dataclasses.field(default_factory=list)
    changes: set[frozenset[str]] = dataclasses.field(default_factory=set)
    is_followed: bool = False


@dataclasses.dataclass(eq=False)
class OpenCall:
    """A call that the engine works on, and how many callers wait for it."""

    task: asyncio.Task[Reply]
    limits: Limits
    waiting: int = 0


def root_of(node: Node) -> Node:
    """Return the root above a node."""
    while node.above is not None:
        node = node.above
    return node


def answer_to_repeat(node: Node, limits: Limits) -> Reply | None:
    """Return the newest answer of a node if nothing followed it, so that a retry gets it again."""
    if not node.answers:
        return None
    newest = node.answers[-1]
    return None if newest.is_followed or newest.limits != limits else newest.reply


def call_to_join(node: Node, limits: Limits, retry: bool | None) -> OpenCall | None:
    """Return the open call that a retry waits for: one whose caller went away, or any."""
    for call in reversed(node.open):
        if call.limits == limits and (retry or not call.waiting):
            return call
    return None


async def wait_for(call: OpenCall) -> Reply:
    """Wait for a call; it goes on where its caller is cancelled."""
    call.waiting += 1
    try:
        return await asyncio.shield(call.task)
    finally:
        call.waiting -= 1


def retrieve(task: asyncio.Task[Any]) -> None:
    """Take the error of a call whose caller went away, so that the event loop logs none."""
    if not task.cancelled():
        task.exception()
