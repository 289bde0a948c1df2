"""An agent that knows nothing of this project: two pages of Python, and any OpenAI-style model.

It reads its task from $INSTRUCTION and asks the model at $OPENAI_BASE_URL, with one tool, a shell.
It runs anywhere; here, in the sandbox of a task, where the model is the policy that is trained:

    python -m launch.train --config=experiments/ipa.py --config.agent_files=examples/agents \
        --config.agent='command:python3 $AGENT_FILES/outside_agent.py'
"""

import json
import os
import subprocess
import urllib.request

MAX_TURNS = 16
MAX_CHARACTERS = 2000  # of a command's output that the model is shown
COMMAND_SECONDS = 10
BASH = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command in a shell and get its output.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
}


def ask(messages):
    """Return the model's next message."""
    # a small policy that was trained without a description of tools is not told of them
    tools = [] if os.environ.get("TELL_TOOLS") == "0" else [BASH]
    body = {"model": "policy", "messages": messages, "tools": tools}
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps(body).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"],
        },
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["message"]


def run(arguments):
    """Run the command of a call; return what the model is shown."""
    try:
        command = json.loads(arguments)["command"]
        done = subprocess.run(
            ["bash", "-c", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
        )
    except (ValueError, KeyError, TypeError) as error:
        return f"not a call of bash: {error!r}"
    except subprocess.TimeoutExpired:
        return "[timeout]"
    output = (done.stdout + done.stderr).rstrip("\n")[:MAX_CHARACTERS]
    if done.returncode:
        return f"{output}\n[exit {done.returncode}]".lstrip("\n")
    return output or "(no output)"


def main():
    messages = [{"role": "user", "content": os.environ["INSTRUCTION"]}]
    for _ in range(MAX_TURNS):
        said = ask(messages)
        messages.append(said)
        calls = said.get("tool_calls") or []
        if not calls:
            return
        for call in calls:
            content = run(call["function"]["arguments"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})


if __name__ == "__main__":
    main()
