"""The context: what a compaction keeps, when it fires, and that it always ends."""

import asyncio
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent.iflow import context
from rome.agent.iflow import events as ev
from rome.agent.iflow.context import ContextManager
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.model import ModelError
from rome.agent.iflow.specs.hooks import Hooks
from tests.rome.agent.iflow.doubles import Folder, Note, ScriptedModel, calls

SHELL = {"type": "function", "function": {"name": "shell", "parameters": {"type": "object"}}}


class Counting:
    """A model whose tokens are words; it says its answers one after the other."""

    name = "counting"

    def __init__(self, context_tokens=1000, answers=()):
        self.context_tokens = context_tokens
        self.answers = list(answers)
        self.asked = []

    async def ask(self, messages, tools, *, edge=None, max_tokens=None, on_text=None):
        self.asked.append((list(messages), max_tokens))
        said = self.answers.pop(0) if self.answers else "They work on it; the key is 17."
        if isinstance(said, Exception):
            raise said
        if isinstance(said, float):
            await asyncio.sleep(said)
        return said if isinstance(said, AssistantMessage) else AssistantMessage(text=str(said))

    def count_tokens(self, messages, tools=()):
        return sum(
            4
            + len(message.content.split())
            + sum(len(c.arguments.split()) for c in message.tool_calls)
            for message in messages
        ) + 10 * len(tools)

    async def aclose(self):
        pass


class Session:
    """A log and the conversation that folds it."""

    def __init__(self, model=None, store=True, workspace=None, hooks=None):
        self.log = EventLog()
        self.conversation = Conversation()
        self.log.listen(self.conversation.add)
        self.model = model or Counting()
        self.files = {}
        self.workspace = workspace
        self.hooks = hooks or Hooks()
        self.context = ContextManager(store=self.keep if store else None)
        self.add(
            ev.SessionStarted(session="s", directory="/", model="m", mode="yolo", system="You act.")
        )
        self.calls = 0

    def schemas(self):
        return [SHELL]

    async def run_hooks(self, event, payload, *, matcher):
        return await self.hooks.run(event, payload, matcher=matcher)

    async def keep(self, name, text):
        self.files[f"/outputs/{name}"] = text
        return f"/outputs/{name}"

    def add(self, event):
        return self.log.append(event)

    def say(self, text, source="user"):
        return self.add(ev.UserMessage(text=text, source=source))

    def act(self, *outputs, text="", changed=(), usage=ev.NO_USAGE):
        """One answer with as many calls as there are outputs."""
        calls = []
        for _ in outputs:
            self.calls += 1
            calls.append(ev.ToolCall(f"c{self.calls}", "shell", '{"command": "x"}'))
        self.add(ev.AssistantMessage(text=text, tool_calls=tuple(calls), usage=usage))
        for call, output in zip(calls, outputs, strict=True):
            self.add(ev.ToolStarted(call=call))
            self.add(ev.ToolFinished(call_id=call.id, output=output, changed=tuple(changed)))

    def prepare(self):
        return asyncio.run(self.context.prepare(self))

    def compact(self, trigger="user", **options):
        asyncio.run(self.context.compact(self, trigger, **options))

    def of(self, kind):
        return [event for event in self.log.events if isinstance(event, kind)]


def words(count, word="word"):
    return " ".join([word] * count)


def check_pairs(messages):
    """Each call in the context has its result right after it, and each result its call."""
    waiting = []
    for message in messages:
        if message.role == "tool":
            assert message.tool_call_id in waiting
            waiting.remove(message.tool_call_id)
            continue
        assert not waiting
        waiting = [call.id for call in message.tool_calls]
    assert not waiting


def test_a_short_conversation_is_shown_as_it_is():
    session = Session()
    session.say("go")
    session.act("done")
    assert session.prepare() == session.conversation.messages
    assert not session.of(ev.ContextCompacted) and not session.model.asked


def test_long_outputs_of_old_calls_move_to_files_before_anything_is_summarised():
    session = Session()
    session.say("find the key")
    session.act(words(500, "old"))
    session.act(words(250, "middle"))
    session.act(words(60, "new"))
    messages = session.prepare()
    (moved,) = session.of(ev.OutputMoved)
    assert session.files[moved.file] == words(500, "old") and moved.tokens > 500
    texts = [message.content for message in messages]
    assert not any("old old" in text for text in texts)
    assert any(moved.file in text for text in texts), "the context names the file"
    assert words(250, "middle") in texts and words(60, "new") in texts
    assert not session.model.asked, "no summary was needed"


def test_an_output_that_has_a_file_is_not_written_again():
    session = Session()
    session.say("go")
    call = ev.ToolCall("c", "shell", "{}")
    session.add(ev.AssistantMessage(tool_calls=(call,)))
    session.add(ev.ToolFinished(call_id="c", output=words(600), file="/whole.txt"))
    session.act(words(250))
    session.prepare()
    assert [moved.file for moved in session.of(ev.OutputMoved)] == ["/whole.txt"]
    assert not session.files


def test_a_summary_keeps_the_newest_messages_and_the_requests_word_for_word():
    session = Session(store=False)
    session.say("first  request")
    session.act(words(300))
    session.say("second\n\n  request, exactly ")
    session.say("and faster", "steer")
    session.act(words(400))
    session.act(words(100, "new"), text="looking")
    messages = session.prepare()
    (compacted,) = session.of(ev.ContextCompacted)
    assert compacted.fallback == "" and "the key is 17" in messages[1].content
    assert "second\n\n  request, exactly \n\nand faster" in messages[1].content
    assert messages[-1].content == words(100, "new")
    assert words(10) not in "".join(message.content for message in messages)
    asked, limit = session.model.asked[0]
    assert words(400) in [message.content for message in asked] and limit <= 125
    check_pairs(messages)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ModelError("no such model"), "no such model"),
        (ModelError("too long", is_context_full=True), "too long"),
        (AssistantMessage(text="  "), "empty"),
        (AssistantMessage(text="", tool_calls=(ev.ToolCall("x", "shell", "{}"),)), "a call"),
        (AssistantMessage(text="and so on and", finish="length"), "longer than"),
        (9.0, "no answer within"),
    ],
)
def test_a_summary_that_fails_is_replaced_by_a_list_of_what_was_done(answer, reason, monkeypatch):
    monkeypatch.setattr(context, "SUMMARY_SECONDS", 0.05)
    session = Session(Counting(answers=[answer]), store=False)
    session.say("find the key")
    session.act(words(400), text="I look into the drawer")
    session.act(words(500), text="I look under the mat")
    messages = session.prepare()
    (compacted,) = session.of(ev.ContextCompacted)
    assert reason in compacted.fallback
    assert "find the key" in messages[1].content
    assert "I look into the drawer" in messages[1].content
    assert session.model.count_tokens(messages) < 800


def test_what_an_earlier_summary_says_survives_a_later_one_that_fails():
    answers = ["The key is 17.", *[ModelError("gone")] * 9]
    session = Session(Counting(answers=answers), store=False)
    session.say("go")
    for _ in range(12):
        session.act(words(300))
        messages = session.prepare()
    assert len(session.of(ev.ContextCompacted)) >= 3
    assert "The key is 17." in messages[1].content


def test_it_fires_once_a_crossing_and_not_again_where_nothing_can_be_gained():
    session = Session(store=False)
    session.say(words(900, "long"))  # the request alone is over the threshold
    for _ in range(30):
        session.act("ok")
        session.prepare()
    assert 1 <= len(session.of(ev.ContextCompacted)) <= 2
    request = session.conversation.messages[1].content
    assert "characters left out" in request, "a request that fills the context is shortened"


def test_an_estimate_that_was_a_little_too_high_does_not_make_it_fire_again(monkeypatch):
    monkeypatch.setattr(context, "TARGET", 0.3)
    monkeypatch.setattr(context, "RECENT", 0.1)
    session = Session(store=False)
    session.say("go")
    fired = []
    for step in range(40):
        tokens = 850 - step % 2  # whatever is left out, the server counts more than the threshold
        session.act("ok", usage=ev.Usage(prompt=tokens, completion=1))
        session.prepare()
        fired.append(len(session.of(ev.ContextCompacted)))
    assert fired[-1] <= 2


def test_an_agent_whose_server_refuses_the_conversation_goes_on_with_a_shorter_one():
    """The loop, its log and its context together."""
    refused = ModelError("the prompt is too long", is_context_full=True)
    model = ScriptedModel(
        calls(("note", {"text": "x" * 4000})), refused, "They noted it; the key is 17.", "done"
    )
    log = EventLog()
    agent = Agent(model, [Note()], log, Folder(), context=ContextManager())
    finished = asyncio.run(agent.run("note it"))
    assert finished.outcome == "finished"
    (compacted,) = [event for event in log.events if isinstance(event, ev.ContextCompacted)]
    assert "the key is 17" in compacted.summary and "note it" in compacted.summary
    assert model.edges[-1] == "compaction"
    assert agent.conversation.usage.prompt == 30, "what the summary used counts"


def test_a_server_that_refuses_all_ends_the_turn_at_its_limit():
    model = ScriptedModel(ModelError("too long", is_context_full=True))
    agent = Agent(model, [], EventLog(), Folder(), context=ContextManager())
    finished = asyncio.run(asyncio.wait_for(agent.run("go"), 60))
    assert (finished.outcome, finished.reason) == ("limit", "too long")


def test_a_long_request_is_whole_in_a_file():
    session = Session()
    session.say(words(900, "long"))
    session.prepare()
    assert session.files["/outputs/request-1.txt"] == words(900, "long")


def test_where_the_model_refused_the_conversation_even_new_outputs_move():
    session = Session()
    session.say("go")
    session.act(words(300))
    session.compact("overflow")
    assert len(session.of(ev.OutputMoved)) == 1 and len(session.of(ev.ContextCompacted)) == 1


def test_the_models_own_count_decides():
    """A tokenizer that is not known here may need three times the tokens."""
    session = Session(store=False)
    session.say("go")
    session.act(words(200), usage=ev.Usage(prompt=700, completion=50))
    session.prepare()
    (compacted,) = session.of(ev.ContextCompacted)
    assert compacted.tokens_before >= 950


def test_hooks_run_around_a_compaction_and_may_prevent_it():
    class Hooks:
        def __init__(self, decision):
            self.decision, self.ran = decision, []

        async def run(self, event, payload, *, matcher=""):
            self.ran.append((event, matcher))
            return dataclasses.make_dataclass("O", ["decision", "context"])(
                self.decision, "colours"
            )

    for decision, happened in (("", 1), ("block", 0)):
        hooks = Hooks(decision)
        session = Session(store=False, hooks=hooks)
        session.say("go")
        session.act(words(900))
        session.prepare()
        session.prepare()
        assert len(session.of(ev.ContextCompacted)) == happened
        assert (
            hooks.ran == [("PreCompact", "threshold"), ("PostCompact", "threshold")][: 1 + happened]
        )
        if happened:
            assert "colours" in session.model.asked[0][0][-1].content


def test_a_store_that_fails_does_not_stop_the_agent():
    async def fail(name, text):
        raise OSError("disk full")

    session = Session()
    session.context._store = fail
    session.say("go")
    session.act(words(500))
    session.act(words(500))
    session.prepare()
    assert "disk full" in session.of(ev.Notice)[0].text
    assert len(session.of(ev.ContextCompacted)) == 1


def test_files_that_changed_outside_are_told_once():
    class Place:
        files: dict = {"a.py": (10, 1.0), "b.py": (5, 1.0)}  # noqa: RUF012

        async def stat(self, path):
            return self.files.get(path)

    read = dict(Place.files)
    session = Session(workspace=Place())
    session.conversation.read_files.update(read)
    session.say("go")
    session.prepare()
    assert not [m for m in session.of(ev.UserMessage) if m.source == "reminder"]
    Place.files = {"a.py": (11, 2.0)}
    for _ in range(3):
        session.prepare()
    (reminder,) = [m for m in session.of(ev.UserMessage) if m.source == "reminder"]
    assert "a.py was changed" in reminder.text and "b.py was deleted" in reminder.text


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="no share"):
        ContextManager(80)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "act", "act", "act", "wide", "say", "steer", "todo", "job", "job_end", "skill",
                "task", "task_end", "change", "fail", "rewind", "user",
            ]
        ),
        st.integers(0, 400),
    ),
    min_size=5,
    max_size=60,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, store=st.booleans())
def test_nothing_of_the_keep_list_is_ever_lost(actions, store):
    session = Session(Counting(context_tokens=1200), store=store)
    session.say("request 0")
    for n, (action, size) in enumerate(actions, 1):
        match action:
            case "act":
                session.act(words(size))
            case "wide":
                session.act(words(size // 3), words(size // 2), text="both")
            case "say":
                session.say(f"request {n}\n  {words(size // 10)}")
            case "steer":
                session.say(f"steer {n}", "steer")
            case "todo":
                items = tuple(
                    ev.TodoItem(f"item {n}.{i}", ["pending", "in_progress", "done"][i % 3])
                    for i in range(size % 5)
                )
                session.add(ev.TodoChanged(items=items))
            case "job":
                session.add(ev.JobStarted(job=f"job{n}", command=f"sleep {n}"))
            case "job_end" if session.conversation.jobs:
                session.add(ev.JobFinished(job=next(iter(session.conversation.jobs))))
            case "skill":
                session.add(ev.SkillLoaded(name=f"skill{n}"))
            case "task":
                session.add(ev.SubagentStarted(id=f"agent-{n}", agent="general", prompt="look"))
            case "task_end" if session.conversation.subagents:
                id = next(iter(session.conversation.subagents))
                session.add(ev.SubagentFinished(id=id, outcome="finished", result=""))
            case "change":
                session.act("ok", changed=[f"src/file{n}.py"])
            case "fail":
                session.model.answers.append(ModelError("gone"))
            case "rewind":
                requests = session.conversation.requests
                target = requests[size % len(requests)]
                if target.number > requests[0].number:
                    session.add(ev.Rewound(to=target.number, conversation=True, files=False))
            case "user":
                session.compact("user")
        before = len(session.of(ev.ContextCompacted))
        messages = session.prepare()
        fired = len(session.of(ev.ContextCompacted)) - before
        check_pairs(messages)
        session.prepare()
        assert len(session.of(ev.ContextCompacted)) == before + fired, "it fired twice"
        check_kept(session, messages)
    again = Conversation.of(session.log.events)
    assert again.messages == session.conversation.messages


def check_kept(session, messages):
    """All that must be kept stands in the context, or the context was never shortened."""
    text = "\n".join(message.content for message in messages)
    state = session.conversation
    assert sum(entry.source == "summary" for entry in state.entries) <= 1
    requests = state.requests
    last = max(i for i, one in enumerate(requests) if one.source == "user")
    assert all(one.text in text for one in requests[last:])
    if not any(entry.source == "summary" for entry in state.entries):
        return
    compacted = next(e.number for e in reversed(state.entries) if e.source == "summary")
    facts = [job.command for job in state.jobs.values() if job.number < compacted]
    todo = [e for e in session.of(ev.TodoChanged) if e.items == state.todo]
    if todo and todo[-1].number < compacted:
        facts += [item.text for item in state.todo if item.status != "done"]
    facts += [
        e.name
        for e in session.of(ev.SkillLoaded)
        if e.number < compacted and e.name in state.skills
    ]
    facts += [one.id for one in state.known_subagents.values() if one.number < compacted]
    changes = [e for e in session.of(ev.ToolFinished) if e.number < compacted]
    facts += [p for e in changes for p in e.changed]
    for fact in facts:
        assert fact in text, fact
