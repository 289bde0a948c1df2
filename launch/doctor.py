"""Say what this machine can do for training, and what to do for more.

python -m launch.doctor [--quick] [--json FILE]

Tries each mechanism and ends with one demonstration played in a sandbox from task to verdict. Exit
status 1 where that fails, since then nothing can be trained. `--quick` plays only that and prints
something only when it fails: `make train` begins with it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rome.stages.doctor import Finding, check_episode, findings


def main(
    argv: Sequence[str] | None = None, checks: Callable[[], Iterator[Finding]] = findings
) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only play the demonstration")
    parser.add_argument("--json", type=pathlib.Path, help="also write the findings to this file")
    flags = parser.parse_args(argv)
    if flags.quick:
        episode = check_episode()
        if not episode.works:
            print(f"launch.doctor: {episode.says}. {episode.remedy}", file=sys.stderr)
        return 0 if episode.works else 1
    found = list(checks())
    show(found)
    if flags.json:
        flags.json.write_text(json.dumps([finding._asdict() for finding in found], indent=1))
    return 0 if found[-1].works else 1


def show(found: Sequence[Finding]) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in found:
        works = "[green]yes[/green]" if finding.works else "[yellow]no[/yellow]"
        text = finding.says
        if finding.remedy:
            text += f"\n[bold]for more:[/bold] {finding.remedy}"
        table.add_row(works, finding.what, text)
    Console(highlight=False, soft_wrap=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
