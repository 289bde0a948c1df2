"""Tasks from a command's help: what is read of it, and that both options count."""

import asyncio
import dataclasses

import pytest

from envs.tasks.harbor.errors import TaskError
from envs.tasks.made.prove import judge_programs
from envs.tasks.made.tools import is_tool_name, read_options, tool_drafts

HELP = """\
Usage: sift [OPTION]... [FILE]...

  -a, --all             keep   all lines
  -k, --key=KEYDEF      sort via a key
  -r                    reverse the order
      --long-only       no short flag
  -a, --again           listed twice
  -h, --help            display this help and exit
  -V, --version         output version information and exit
"""


def test_options_without_an_argument_are_read_with_the_help_s_words():
    options = {option.flag: option.words for option in read_options(HELP)}
    assert options["-a"] == "keep all lines" and options["-r"] == "reverse the order"
    assert "-k" not in options and "-h" not in options
    hostile = "".join(f"  -{letter}, --x  {'y' * 999}\n" for letter in "abcdefghijklmnopqrstuvw")
    assert len(read_options(hostile)) == 16
    assert max(len(option.words) for option in read_options(hostile)) <= 160


def test_only_the_name_of_a_command_is_taken():
    assert is_tool_name("sort") and is_tool_name("g++-12")
    for name in ("", "-x", "/bin/sh", "../x", "a b", "a;b", "$(x)", "a\n"):
        assert not is_tool_name(name)


@pytest.mark.slow
def test_a_task_needs_both_options_and_one_seed_makes_one_set():
    drafts = asyncio.run(tool_drafts("sort", 2, 5, "best_available"))
    again = asyncio.run(tool_drafts("sort", 2, 5, "best_available"))
    assert drafts == again and len(drafts) == 2
    draft = drafts[0]
    tool, one, two = draft.oracle.split()
    programs = [draft.oracle, tool, f"{tool} {one}", f"{tool} {two}", f"{tool} {two} {one}"]
    outcomes = asyncio.run(judge_programs(draft, programs))
    assert [not faults for faults in outcomes] == [True, False, False, False, True]
    assert dataclasses.replace(draft, name="a/b").digest == draft.digest
    with pytest.raises(TaskError, match="no such command"):
        asyncio.run(tool_drafts("no-such-command", 2, 5, "best_available"))
