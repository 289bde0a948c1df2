"""Train a tiny model on your own conversations.

python -m examples.sft_on_messages

The command line does the same with your files (docs/datasets.md has the formats):
python -m launch.train --config=experiments/sft.py:smoke \\
    --config.trajectories=DIR --config.eval_tasks=0
"""

import json
import pathlib
import tempfile

from rome.stages.config import load_config
from rome.stages.experiment import run
from rome.train.report import read_report
from rome.train.team import Team


def conversation(number: int) -> dict:
    """Return one conversation in OpenAI's form; only what the assistant says is learned."""
    asked = {"role": "user", "content": f"What comes after {number}?"}
    said = {"role": "assistant", "content": f"After {number} comes {number + 1}."}
    return {"messages": [asked, said]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "talk.jsonl")
        lines = [json.dumps(conversation(number)) for number in range(100)]
        lines.append('{"messages": [{"role": "wizard"}]}')  # does not fit: it is set aside
        data.write_text("\n".join(lines))
        config = load_config("experiments/sft.py", "smoke")
        config.steps, config.trajectories = 12, str(data)
        config.eval_tasks = 0  # no task is played: only held-out conversations are scored
        workdir = pathlib.Path(folder, "run")
        run(config, workdir, Team())
        bits = [entry.bits_per_token for entry in read_report(workdir)["evals"]]
        print(f"bits a token: {bits[0]:.1f}, then {bits[1]:.1f}")
        print((workdir / "set_aside.jsonl").read_text())
