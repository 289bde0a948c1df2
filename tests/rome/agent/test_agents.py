"""Agents that others publish, unmodified, each solving a task through the model proxy.

They are installed where sandboxes see them, below /usr:

    PREFIX=/usr/local/share/agents
    python3 -m pip install --target $PREFIX/mini mini-swe-agent
    npm install --prefix $PREFIX/node @qwen-code/qwen-code opencode-ai @anthropic-ai/claude-code
"""

import asyncio
import json
import os
import pathlib

import pytest

from envs.gem import format_tool_call
from envs.rock import SandboxConfig, probe
from envs.tasks.terminal import make_task
from envs.tasks.terminal.env import TerminalEnv
from rome.agent.command import CommandAgent, run_command_episode
from rome.agent.loop import Limits
from rome.data.packing import pack
from tests.rome.agent.test_dialogue import CHAT, Scripted

pytestmark = [pytest.mark.slow, pytest.mark.live]
PREFIX = pathlib.Path(os.environ.get("AGENTS", "/usr/local/share/agents"))
BIN = PREFIX / "node/node_modules/.bin"
LIMITS = Limits(max_context=80_000, max_new_tokens=500, episode_seconds=300.0)
HOME = "export HOME=/tmp/home; mkdir -p $HOME; "
SOLUTION = "grep -c rain list.txt > out.txt"
OPENCODE = {
    "provider": {
        "rome": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": "http://model/v1", "apiKey": "none"},
            "models": {"policy": {"limit": {"context": 60_000, "output": 500}}},
        }
    },
    "model": "rome/policy",
    "small_model": "rome/policy",
}


def bash(command):
    return format_tool_call("bash", {"command": command})


def other(tool, **more):
    def call(command):
        return format_tool_call(tool, {"command": command, "description": "x", **more})

    return call


AGENTS = {
    "mini-swe-agent": (
        PREFIX / "mini/minisweagent",
        f"PYTHONPATH={PREFIX}/mini MSWEA_CONFIGURED=true MSWEA_COST_TRACKING=ignore_errors"
        ' python3 -m minisweagent.run.mini -t "$INSTRUCTION" -y --exit-immediately'
        " -m openai/policy -o /tmp/record.json",
        [bash("ls"), bash(SOLUTION), bash("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")],
    ),
    "qwen-code": (
        BIN / "qwen",
        f"node {BIN}/qwen --openai-api-key none --openai-base-url $OPENAI_BASE_URL -m policy"
        ' --auth-type openai --yolo -p "$INSTRUCTION"',
        [
            other("run_shell_command", is_background=False)("ls"),
            other("run_shell_command", is_background=False)(SOLUTION),
            "done",
        ],
    ),
    "opencode": (
        BIN / "opencode",
        f"echo '{json.dumps(OPENCODE)}' > $HOME/config.json; OPENCODE_CONFIG=$HOME/config.json"
        f' OPENCODE_DISABLE_MODELS_FETCH=1 {BIN}/opencode run -m rome/policy "$INSTRUCTION"',
        # It asks for a title of the session, too, at the same time: any answer will do for it.
        [bash("ls"), bash(SOLUTION), "done", "done"],
    ),
    "claude-code": (
        BIN / "claude",
        f'IS_SANDBOX=1 CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 {BIN}/claude -p "$INSTRUCTION"'
        " --model policy --dangerously-skip-permissions",
        [other("Bash")("ls"), other("Bash")(SOLUTION), "done"],
    ),
}


@pytest.mark.parametrize("name", AGENTS)
def test_an_unmodified_agent_solves_a_task_and_its_record_trains(name):
    program, command, turns = AGENTS[name]
    if not program.exists():
        pytest.skip(f"{program} is not installed; the docstring says how")
    if probe(tier="namespaces").tier is None:
        pytest.skip("no namespaces tier here")

    def make_env(doors):
        config = SandboxConfig(
            isolation="best_available",
            tier="namespaces",
            memory_mb=2500,
            disk_mb=400,
            pids=256,
            open_files=512,
            doors=doors,
        )
        return TerminalEnv(make_task("count", 3), config)

    engine = Scripted(*turns, "done", "done")
    agent = CommandAgent(f"{HOME}{command} < /dev/null 2>&1")
    playing = run_command_episode(engine, make_env, CHAT, LIMITS, agent, seed=5)
    episode = asyncio.run(asyncio.wait_for(playing, 400))
    assert (episode.ending, episode.reward) == ("success", 1.0), episode.note
    sampled = sum(len(chunk.action_ids) for chunk in episode.chunks)
    rows = pack([episode], row_length=98_304, chunks_per_row=16, gamma=0.95, failure_reward=-1.0)
    assert int(rows.action_mask_BT.sum()) == sampled > 0
