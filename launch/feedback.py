r"""Writes what users said of an agent's answers as data to train on.

python -m launch.feedback ~/.iflow/sessions/PROJECT/ID --out rows.jsonl
python -m launch.feedback ~/.iflow/sessions/PROJECT/* --kind preference --out pairs.jsonl
    # pairs of a better and a worse answer, as programs for DPO read them

`sft` rows are read by `launch.train --config=experiments/sft.py` (docs/datasets.md).
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from rome.agent.iflow.feedback import KINDS, export


def main(argv: list[str] | None = None) -> int:
    """Write the file; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="launch.feedback",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sessions", nargs="+", type=pathlib.Path, metavar="SESSION")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--kind", choices=KINDS, default="sft")
    flags = parser.parse_args(argv)
    try:
        count = export(flags.sessions, flags.out, flags.kind)
    except (ValueError, OSError) as error:
        print(f"launch.feedback: {error}", file=sys.stderr)
        return 1
    print(f"{count} records in {flags.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
