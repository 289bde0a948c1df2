"""Hooks: commands of the user that run at events of a session, and may block what is about to be.

A hook gets the event as JSON on standard input and as IFLOW_* variables. What it answers:

| | means |
|---|---|
| exit status 0, text | context for the model (UserPromptSubmit, SessionStart, SetUpEnvironment) |
| exit status 0, JSON | `decision` (block, approve), `reason`, `continue` (false ends the turn), |
| | `hookSpecificOutput` {permissionDecision, additionalContext, updatedInput} |
| exit status 2 | blocks; what it wrote on standard error is for the model |
| any other, or no answer in time | a notice; blocks in hooks of `.iflow/`, as iFlow had it |

All hooks of an event run at once. The strictest decision holds: block, then ask, then allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Literal

from rome.agent.iflow.events import HookRan
from rome.agent.iflow.specs.settings_values import HookCommand
from rome.agent.iflow.specs.tool_names import names_of

MAX_OUTPUT = 64 << 10  # bytes of each stream that are read
_TEXT_IS_CONTEXT = ("UserPromptSubmit", "SessionStart", "SetUpEnvironment")
_MAY_BLOCK_BY_FAILING = ("PreToolUse", "UserPromptSubmit")
_KEYS_KEPT_BACK = ("IFLOW_apiKey", "IFLOW_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
_DECISIONS = {"block": "block", "deny": "block", "approve": "allow", "allow": "allow", "ask": "ask"}
_STRICTEST_FIRST = ("block", "ask", "allow")

HookDecision = Literal["", "block", "allow", "ask"]


@dataclasses.dataclass(frozen=True)
class HookOutcome:
    """What a hook says, or the hooks of an event together."""

    decision: HookDecision = ""  # the strictest of theirs; "" where none has one
    message: str = ""  # reasons, for the model
    context: str = ""  # text that the model should read
    # Of the call, as the last hook that changed them wants them; None for no change.
    arguments: dict[str, Any] | None = None
    stop: bool = False  # whether the turn ends
    # All that ran, in the order of the settings; the exit status is -1 for those that did not end
    # in time or could not be started.
    ran: tuple[HookRan, ...] = ()


class Hooks:
    """Runs the hooks of a session, in a directory of this machine."""

    def __init__(self, commands: Sequence[HookCommand] = (), directory: str = ".") -> None:
        self._commands = tuple(commands)
        self._directory = os.path.abspath(directory)

    async def run(
        self, event: str, payload: Mapping[str, Any], *, matcher: str = ""
    ) -> HookOutcome:
        """Run all hooks of an event and return what they say together.

        Args:
          event: one of `settings_values.HOOK_EVENTS`.
          payload: of the event: session_id, transcript_path, tool_name, tool_input, tool_response,
            prompt, source, message.
          matcher: what the hooks' expressions are compared with: a tool's name, or a source.
        """
        chosen = [hook for hook in self._commands if hook.event == event and fits(hook, matcher)]
        if not chosen:
            return HookOutcome()
        message = {"hook_event_name": event, "cwd": self._directory, **payload}
        environment = _environment(message)
        outcomes = await asyncio.gather(
            *(_run(hook, json.dumps(message, default=str), environment) for hook in chosen)
        )
        return _combine(outcomes)


def _environment(message: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of a hook; keys to accounts are not its business."""
    kept = {name: text for name, text in os.environ.items() if name not in _KEYS_KEPT_BACK}
    tool = str(message.get("tool_name", ""))
    own = {
        "IFLOW_SESSION_ID": message.get("session_id", ""),
        "IFLOW_TRANSCRIPT_PATH": message.get("transcript_path", ""),
        "IFLOW_CWD": message["cwd"],
        "IFLOW_HOOK_EVENT_NAME": message["hook_event_name"],
        "IFLOW_TOOL_NAME": tool,
        "IFLOW_TOOL_ALIASES": json.dumps(names_of(tool)[1:]) if tool else "",
        "IFLOW_TOOL_ARGS": json.dumps(message.get("tool_input", {}), default=str),
        "IFLOW_USER_PROMPT": message.get("prompt", ""),
        "IFLOW_SESSION_SOURCE": message.get("source", ""),
        "IFLOW_NOTIFICATION_MESSAGE": message.get("message", ""),
        "CLAUDE_PROJECT_DIR": message["cwd"],
    }
    # A variable holds neither NUL nor more than the kernel takes; standard input has it whole.
    own = {name: str(text).replace("\0", "")[:16_000] for name, text in own.items() if text}
    short = {name: text.encode(errors="replace").decode() for name, text in own.items()}
    return kept | short


def fits(hook: HookCommand, matcher: str) -> bool:
    """Return whether a hook's expression is the whole of a name, or of another name of a tool."""
    if hook.matcher in ("", "*") or not matcher:
        return True
    return any(re.fullmatch(hook.matcher, name) for name in names_of(matcher))


async def _run(hook: HookCommand, message: str, environment: dict[str, str]) -> HookOutcome:
    """Run one hook; whatever it does, the session goes on.

    Its streams are files: a child that it leaves behind may keep them open, and is not waited for.
    """
    with contextlib.ExitStack() as files:
        given, output, errors = (
            files.enter_context(tempfile.TemporaryFile()) for _ in ("input", "output", "errors")
        )
        given.write(message.encode())
        given.seek(0)
        try:
            process = await asyncio.create_subprocess_shell(
                hook.command,
                stdin=given,
                stdout=output,
                stderr=errors,
                cwd=environment["IFLOW_CWD"],
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return _failed(hook, -1, f"hook {hook.command!r} cannot be started: {error}")
        try:
            code = await asyncio.wait_for(process.wait(), hook.timeout)
        except TimeoutError:
            message = f"hook {hook.command!r} did not end in {hook.timeout:g} s"
            return _failed(hook, -1, message)
        finally:
            if process.returncode is None:  # late, or cancelled: end it with all that it started
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return _read(hook, code, _beginning(output), _beginning(errors))


def _beginning(stream: BinaryIO) -> str:
    stream.seek(0)
    return stream.read(MAX_OUTPUT).decode(errors="replace")


def _read(hook: HookCommand, code: int, output: str, errors: str) -> HookOutcome:
    """Return what a hook that ended says."""
    if code == 2:
        return _said(hook, code, "block", errors.strip() or f"hook {hook.command!r} blocked it")
    if code != 0:
        return _failed(hook, code, errors.strip() or f"hook {hook.command!r} ended with {code}")
    answer = _answer(output)
    if answer is None:
        context = output.strip() if hook.event in _TEXT_IS_CONTEXT else ""
        return _said(hook, code, context=context)
    special = answer.get("hookSpecificOutput")
    special = special if isinstance(special, dict) else {}
    said = special.get("permissionDecision", answer.get("decision", ""))
    changed = special.get("updatedInput")
    stop = answer.get("continue") is False
    reasons = [special.get("permissionDecisionReason"), answer.get("reason")]
    if stop:
        reasons.append(answer.get("stopReason"))
    return _said(
        hook,
        code,
        _DECISIONS.get(said, "") if isinstance(said, str) else "",
        next((text for text in reasons if isinstance(text, str)), ""),
        context=str(special.get("additionalContext") or "").strip(),
        arguments=changed if isinstance(changed, dict) else None,
        stop=stop,
    )


def _answer(output: str) -> dict[str, Any] | None:
    """Return the JSON object that a hook printed; None where it printed anything else."""
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _failed(hook: HookCommand, code: int, message: str) -> HookOutcome:
    """Return the outcome of a hook that did not work."""
    blocks = hook.is_strict and hook.event in _MAY_BLOCK_BY_FAILING
    return _said(hook, code, "block" if blocks else "", message)


def _said(
    hook: HookCommand, code: int, decision: str = "", message: str = "", **rest: Any
) -> HookOutcome:
    """Return the outcome of one hook, with its event."""
    ran = HookRan(
        event=hook.event, command=hook.command, exit_code=code, decision=decision, message=message
    )
    return HookOutcome(decision, message, ran=(ran,), **rest)  # type: ignore[arg-type]


def _combine(outcomes: Sequence[HookOutcome]) -> HookOutcome:
    given = {one.decision for one in outcomes}
    decision = next((one for one in _STRICTEST_FIRST if one in given), "")
    stop = any(one.stop for one in outcomes)
    deciding = [one.message for one in outcomes if one.message and one.decision == decision]
    changed = [one.arguments for one in outcomes if one.arguments is not None]
    return HookOutcome(
        decision=decision,  # type: ignore[arg-type]
        message="\n".join(deciding) if decision or stop else "",
        context="\n".join(one.context for one in outcomes if one.context),
        arguments=changed[-1] if changed else None,
        stop=stop,
        ran=tuple(ran for one in outcomes for ran in one.ran),
    )
