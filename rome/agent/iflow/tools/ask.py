"""Asks the user: a question, or whether a plan is to be carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rome.agent.iflow.events import ModeChanged
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes

APPROVE = "Carry it out, and ask before changes"
APPROVE_EDITS = "Carry it out, and let edits pass"
REJECT = "Go on planning"
MAX_CHOICES = 8


class AskUserTool(Tool):
    """Asks a question."""

    name = "ask_user"
    description = (
        "Ask the user a question that only the user can answer. Give choices where there are"
        " sensible ones."
    )
    parameters = takes("question", question=of("string"), choices=of("array", items=of("string")))

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        choices = arguments.get("choices", [])
        if len(choices) > MAX_CHOICES:
            raise ToolError(f"choices must be at most {MAX_CHOICES} texts")
        answer = await context.asker.question(arguments["question"], choices)
        if not answer:
            return ToolResult(
                "There is no answer. Decide by yourself, and say at the end what you assumed."
            )
        return ToolResult(f"The user answers: {answer}")


class ExitPlanModeTool(Tool):
    """Ends the mode in which nothing is changed, once the user agrees to a plan."""

    name = "exit_plan_mode"
    description = (
        "In plan mode: show the user the plan, and leave the mode if the user agrees. Plan first"
        " what is to be changed, where, and how it is checked."
    )
    parameters = takes("plan", plan=of("string", "The plan, in Markdown."))

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        if context.mode != "plan":
            raise ToolError(f"the mode is {context.mode}, not plan; go on with the work")
        plan = arguments["plan"].strip()
        if not plan:
            raise ToolError("the plan is empty")
        question = f"{plan}\n\nIs this plan to be carried out?"
        answer = await context.asker.question(question, [APPROVE, APPROVE_EDITS, REJECT])
        if answer.strip().lower() in ("y", "yes"):
            answer = APPROVE
        modes = {APPROVE: "default", APPROVE_EDITS: "accept_edits"}
        if answer in modes:
            context.emit(ModeChanged(mode=modes[answer]))
            return ToolResult("The user agrees. Carry the plan out now.")
        if not answer:
            return ToolResult(
                "There is no answer, so plan mode goes on. The plan is the result; end here.",
                status="denied",
                ends_turn=True,
            )
        said = "" if answer == REJECT else f" The user says: {answer}"
        return ToolResult(f"The user does not agree yet; go on planning.{said}", status="denied")
