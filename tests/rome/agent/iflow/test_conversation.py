"""What holds after some events: the same from a file as live, whole calls, exact rewinds."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent.iflow import events
from rome.agent.iflow.conversation import NO_RESULT, Conversation, events_after_a_kill
from rome.agent.iflow.event_log import EventLog, from_json
from rome.agent.iflow.events import ToolCall


class History:
    """Draws a history as the loop makes them, with what the context was before each request."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.log = EventLog()
        self.conversation = Conversation()
        self.log.listen(self.conversation.add)
        self.before: dict[int, list] = {}
        self.calls = 0
        self.answered_whole: set[str] = set()
        self.log.append(
            events.SessionStarted(
                session="s", directory="/p", model="m", mode="default", system="system"
            )
        )

    def draw(self, steps: int) -> None:
        moves = [self.request, self.answer, self.answer, self.remind, self.move, self.compact]
        moves += [self.rewind, self.plan]
        for _ in range(steps):
            self.rng.choice(moves)()

    def request(self) -> None:
        before = self.conversation.messages
        source = self.rng.choice(["user", "steer"])
        said = self.log.append(events.UserMessage(text=f"request {self.calls}", source=source))
        self.before[said.number] = (before, self.conversation.todo)

    def remind(self) -> None:
        self.log.append(events.UserMessage(text="remember", source="reminder"))

    def plan(self) -> None:
        item = events.TodoItem(f"step {self.calls}")
        self.log.append(events.TodoChanged(items=(item,)))

    def answer(self) -> None:
        made = []
        for _ in range(self.rng.randrange(4)):
            self.calls += 1
            made.append(ToolCall(f"c{self.calls}", "shell", '{"command": "ls"}'))
        self.log.append(
            events.AssistantMessage(
                text="I look",
                tool_calls=tuple(made),
                usage=events.Usage(self.calls, 1),
            )
        )
        if made and self.rng.random() < 0.1:  # an environment answers all of them at once
            self.answered_whole.add(made[0].id)
            self.log.append(events.ToolFinished(call_id="", output="all done"))
            return
        self.rng.shuffle(made)
        for call in made:
            self.log.append(events.ToolFinished(call_id=call.id, output=f"result of {call.id}"))
            if self.rng.random() < 0.1:
                self.log.append(events.Notice(text="by the way"))

    def move(self) -> None:
        results = [entry for entry in self.conversation.entries if entry.finished is not None]
        if results:
            call = self.rng.choice(results).call
            if call is not None:
                self.log.append(events.OutputMoved(call_id=call.id, file="/f", tokens=9))

    def compact(self) -> None:
        entries = self.conversation.entries
        kept_from = self.rng.choice(entries).number if entries else 0
        if self.rng.random() < 0.3:
            kept_from = len(self.log.events)
        self.log.append(
            events.ContextCompacted(
                summary=f"summary {self.calls}",
                kept_from=kept_from,
                tokens_before=9,
                tokens_after=1,
            )
        )

    def rewind(self) -> None:
        if self.conversation.requests and self.rng.random() < 0.5:
            to = self.rng.choice(self.conversation.requests).number
            has_conversation = self.rng.random() < 0.8
            self.log.append(events.Rewound(to=to, conversation=has_conversation, files=True))
            if has_conversation:
                messages, todo = self.before[to]
                assert self.conversation.messages == messages
                assert self.conversation.todo == todo


def state(conversation):
    """Return all that a conversation says."""
    hidden = {"_views", "_results", "_requests", "_todos", "_checkpoints"}
    values = {name: value for name, value in vars(conversation).items() if name not in hidden}
    said = (conversation.messages, conversation.todo, conversation.requests)
    return values, said, [(entry.number, entry.source) for entry in conversation.entries]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40))
def test_a_session_read_from_its_file_is_the_session_as_it_was(seed, steps):
    history = History(random.Random(seed))
    history.draw(steps)
    read = [from_json(json.loads(json.dumps(event.to_json()))) for event in history.log.events]
    assert read == history.log.events
    assert state(Conversation.of(read)) == state(history.conversation)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40))
def test_results_follow_their_calls_in_order_and_none_is_alone(seed, steps):
    history = History(random.Random(seed))
    history.draw(steps)
    waiting: list[str] = []
    for message in history.conversation.messages:
        if message.role == "tool" and message.tool_call_id in history.answered_whole:
            waiting = []
        elif message.role == "tool":
            assert message.tool_call_id == waiting.pop(0)
            assert message.content != NO_RESULT
        else:
            assert not waiting
        if message.role == "assistant":
            waiting = [call.id for call in message.tool_calls]
    assert not waiting


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.floats(0, 1))
def test_after_a_kill_anywhere_every_beginning_gets_its_end(seed, steps, share):
    history = History(random.Random(seed))
    history.draw(steps)
    extra = [
        events.TurnStarted(turn=1),
        events.JobStarted(job="j", command="sleep 9"),
        events.SubagentStarted(id="a", agent="x", prompt="p"),
        events.QuestionAsked(request="q", question="which?"),
        events.ApprovalRequested(request="r", call=ToolCall("c", "shell", "{}")),
    ]
    all_events = [*history.log.events, *extra]
    rest = all_events[: round(share * len(all_events))]
    conversation = Conversation.of(rest)
    open_calls = set(conversation.open_calls)
    ends = events_after_a_kill(conversation)
    for place, event in enumerate(ends, len(rest)):
        object.__setattr__(event, "number", place)
        conversation.add(event)
    ended = [event.call_id for event in ends if isinstance(event, events.ToolFinished)]
    assert set(ended) == open_calls and len(ended) == len(open_calls)
    assert not conversation.open_calls and not conversation.open_requests
    assert not conversation.jobs and not conversation.subagents and not conversation.is_working
    assert events_after_a_kill(conversation) == []


def test_the_state_is_what_the_events_say():
    log = EventLog()
    conversation = Conversation()
    log.listen(conversation.add)
    log.append(events.TurnStarted(turn=3))
    log.append(events.AssistantMessage(text="a", usage=events.Usage(10, 5, price=0.5)))
    log.append(events.SubagentStarted(id="a", agent="x", prompt="p"))
    log.append(
        events.SubagentFinished(
            id="a", outcome="finished", result="r", usage=events.Usage(100, 50, price=1.0)
        )
    )
    assert (conversation.turn, conversation.is_working) == (3, True)
    assert conversation.context_tokens == 15
    assert conversation.turn_usage == events.Usage(110, 55, price=1.5)
    log.append(events.CheckpointTaken(checkpoint="one"))
    log.append(events.CheckpointTaken(checkpoint="two"))
    assert conversation.checkpoint_of(0) == "one"
    assert conversation.checkpoint_of(4) == "two"
    assert conversation.checkpoint_of(5) == ""
    log.append(events.ModelChanged(model="other"))
    log.append(events.TurnStarted(turn=4))
    assert conversation.model == "other"
    assert conversation.turn_usage == events.NO_USAGE
    assert conversation.usage.price == 1.5
