"""An agent of many: it asks, lets eight sub-agents work at once, and says what they found.

It runs in the sandbox of a task, and knows of the model what outside_agent.py knows.
"""

import concurrent.futures
import sys

import outside_agent

SUBAGENTS = 8


def work(number):
    """Hold a conversation of two answers with a system text of its own."""
    messages = [
        {"role": "system", "content": f"You are sub-agent {number}."},
        {"role": "user", "content": "Look around."},
    ]
    for _ in range(2):
        said = outside_agent.ask(messages)
        messages.append(said)
        messages.append({"role": "user", "content": "Go on."})
    return said["content"]


def main():
    """Ask, delegate, and ask again."""
    messages = [{"role": "user", "content": "Delegate."}]
    messages.append(outside_agent.ask(messages))
    with concurrent.futures.ThreadPoolExecutor(SUBAGENTS) as pool:
        found = list(pool.map(work, range(SUBAGENTS)))
    messages.append({"role": "user", "content": "; ".join(found)})
    print(outside_agent.ask(messages)["content"])


if __name__ == "__main__":
    sys.exit(main())
