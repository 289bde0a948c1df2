"""Corpora of small repositories: what documents hold, that answers are proven, what is kept."""

import asyncio
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest

from envs.rock import SandboxError
from rome.data.documents import Text
from rome.data.text import document_ids, read_corpus
from rome.data.trajectory import Chunk, Trajectory, save_trajectory
from rome.model.tokenizer import TINY, Tokenizer
from rome.synth.claim import ClaimError
from rome.synth.cpt import steps
from rome.synth.cpt.corpus import Settings, build_corpus
from rome.synth.cpt.edits import apply_edits
from rome.synth.cpt.execute import Runs
from rome.synth.cpt.repository import Repository
from tests.paths import ROOT
from tests.rome.synth.cpt.repositories import TABLE, WORDS, commit, git, make_repository

TOKENIZER = Tokenizer.load(TINY)


def build(out, *repositories, **settings):
    settings = {"evaluation_sets": (), **settings}
    wanted = Settings(tuple(str(one) for one in repositories), **settings)
    return asyncio.run(build_corpus(wanted, out, TOKENIZER))


PARAMETRISED = """\
@pytest.mark.parametrize("text, count", [("a::b c", 2)])
def test_count(text, count):
    assert count_words(text) == count
"""


def documents_of(out):
    """Return {kind: documents} of a corpus."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.glob("stage*/*.jsonl"))
    }


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return make_repository(tmp_path_factory.mktemp("clones") / "wordy")


@pytest.fixture(scope="module")
def built(repository, tmp_path_factory):
    """The corpus of the repository, its code run in sandboxes, and its card."""
    out = tmp_path_factory.mktemp("out") / "corpus"
    card = build(out, repository)
    return out, card


def test_every_kind_of_document_is_made(built):
    _, card = built
    kept = {kind: row["kept"] for kind, row in card["kinds"].items()}
    assert kept == {
        "file": 4,
        "repository": 1,
        "localisation": 2,
        "repair": 2,
        "tests": 1,
        "steps": 3,
    }
    assert card["documents"] == sum(kept.values()) and card["tokens"] > 0
    assert card["counts"]["commits"] == 3 and card["seconds"]["tests"] > 0


def test_a_repair_applies_and_makes_the_commit(built, repository):
    out, _ = built
    for document in documents_of(out)["repair"]:
        identity = document["origin"]["commit"]
        before, after = ({}, {})
        for path in document["origin"]["paths"]:
            after[path] = git(repository, "show", f"{identity}:{path}")
            before[path] = git(repository, "show", f"{identity}^:{path}")
        blocks = document["text"].split("## Change\n")[1]
        assert apply_edits(before, blocks) == after


def test_a_localisation_names_the_changed_lines_and_functions(built):
    out, _ = built
    texts = [one["text"] for one in documents_of(out)["localisation"]]
    line = TABLE.split("\n").index(
        "        best = max(self.counts, key=lambda word: self.counts[word])"
    )
    assert any(f"table.py: lines {line + 1} (Table.most)" in text for text in texts)


def test_tests_of_a_commit_fail_before_it_and_pass_after(built):
    out, _ = built
    (document,) = documents_of(out)["tests"]
    assert document["origin"]["fails_before"] == ["test_all.py::test_most"]
    assert "min(self.counts" in document["text"]  # the source is shown as it was
    assert "not the rarest" in document["text"] and "def test_most" in document["text"]


def test_steps_write_callees_before_their_callers(built):
    out, _ = built
    steps = sorted(documents_of(out)["steps"], key=lambda one: one["origin"]["step"])
    tests = [one["origin"]["test"].rpartition("::")[2] for one in steps]
    assert tests == ["test_split", "test_count", "test_most"]
    wanted = [re.search(r"callees first\n(.*?)\n\n", one["text"], re.S)[1] for one in steps]
    assert wanted[0] == "- words.py: split_words" and wanted[1] == "- words.py: count_words"
    assert set(wanted[2].split("\n")) == {
        f"- table.py: Table.{name}" for name in ("__init__", "add", "most")
    }
    shown = steps[1]["text"].split("## Files\n")[1].split("## Functions")[0]
    assert "words = text.split()" in shown and "return len(words)" not in shown


def test_control_tokens_are_ids_and_files_that_spell_them_are_text(built):
    out, _ = built
    with_fim = [one for one in documents_of(out)["file"] if one["control"]]
    (whole,) = documents_of(out)["repository"]
    assert whole["text"].startswith("<|repo_name|>wordy\n<|file_sep|>")
    assert whole["text"].index("words.py\n") < whole["text"].index("table.py\n")  # imports first
    for document in with_fim:
        names = [document["text"][start:end] for start, end in document["control"]]
        assert names == ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    text = Text.of("<|im_start|>a<|im_start|>", [(0, 12)])
    ids = document_ids(TOKENIZER, text).tolist()
    assert ids[0] == TOKENIZER.im_start and TOKENIZER.im_start not in ids[1:]


def test_cpt_reads_what_was_made(built):
    out, card = built
    read = read_corpus(f"0.9*{out / 'stage1'} + 0.1*{ROOT / 'LICENSE'}", 0.3)
    assert read.count + len(read.held_out) == card["documents"] + 1
    assert [share for _, share in read.training] == [0.9, 0.1]


def test_the_same_run_again_repeats_nothing_and_another_one_is_refused(built, repository):
    out, card = built
    before = {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    texts = {path: path.read_bytes() for path in out.glob("stage1/*")}
    again = build(out, repository)
    assert {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()} == before
    assert {path: path.read_bytes() for path in out.glob("stage1/*")} == texts
    assert again["kinds"] == card["kinds"]
    with pytest.raises(ClaimError, match="whose seed is 0, not 1"):
        build(out, repository, seed=1)


def test_copies_and_evaluation_tasks_are_left_out(repository, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    leaked = "Write the number of lines in each log file below /var/log to a report, largest first"
    task = tmp_path / "set" / "leak"
    shutil.copytree(ROOT / "envs/tasks/harbor/examples/sales-join", task)
    (task / "instruction.md").write_text(f"{leaked}, and sort equal ones by their names.\n")
    commit(
        copy,
        "Add notes on what to do next",
        **{"notes.md": f"To do:\n{leaked}, and sort equal ones by name.\n"},
    )
    card = build(
        tmp_path / "out",
        repository,
        copy,
        runs_code=False,
        commits=0,
        fim_share=0.0,
        evaluation_sets=(str(task),),
    )
    row = card["kinds"]["file"]
    assert (row["made"], row["exact"], row["contaminated"], row["kept"]) == (9, 4, 1, 4)
    assert card["contaminating_tasks"]
    kept = documents_of(tmp_path / "out")
    assert not any(leaked in one["text"] for some in kept.values() for one in some)


def test_hostile_repositories_are_set_aside_and_nothing_of_them_runs(tmp_path):
    marker = tmp_path / "ran"
    hostile = make_repository(tmp_path / "hostile")
    (hostile / ".git/hooks").mkdir(exist_ok=True)
    for hook in ("post-checkout", "pre-commit", "post-index-change"):
        (hostile / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch {marker}\n")
    with open(hostile / ".git/config", "a") as file:
        file.write(
            f'[core]\n\tfsmonitor = "touch {marker}"\n\tpager = "touch {marker}"\n'
            f'[diff "x"]\n\ttextconv = "touch {marker};cat"\n\tcommand = "touch {marker}"\n'
            f'[filter "x"]\n\tsmudge = "touch {marker}"\n\tclean = "touch {marker}"\n'
        )
    (hostile / ".git/hooks/pre-commit").chmod(0o644)
    tree = {
        ".gitattributes": "* filter=x diff=x\n",
        "pointer.bin": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "latin.txt": "é".encode("latin-1") * 40,
        "huge.txt": "x y\n" * 100_000,
        "made.py": "# @generated by a tool\n" + "x = 1\n" * 9,
        "node_modules/a.js": "let a = 1;\n" * 9,
        "flat.js": "a" * 5000,
    }
    for name, content in tree.items():
        path = hostile / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    os.symlink("/etc/passwd", hostile / "link")
    objects = git(hostile, "hash-object", "-w", "--no-filters", *tree).split()
    for name, blob in zip(tree, objects, strict=True):
        git(hostile, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}")
    link = git(hostile, "hash-object", "-w", "--no-filters", "LICENSE").strip()
    git(hostile, "update-index", "--add", "--cacheinfo", f"120000,{link},link")
    git(hostile, "commit", "-q", "-m", "Add many kinds of files that are no source")
    gpg = tmp_path / "gpg"
    gpg.write_text(f"#!/bin/sh\ntouch {marker}\n")
    gpg.chmod(0o755)
    git(hostile, "config", "gpg.program", str(gpg))
    git(hostile, "config", "log.showSignature", "true")
    signature = "gpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----\n"
    plain = git(hostile, "cat-file", "commit", "HEAD")
    (tmp_path / "signed").write_text(plain.replace("\n\n", f"\n{signature}\n", 1))
    signed = git(hostile, "hash-object", "-w", "-t", "commit", str(tmp_path / "signed")).strip()
    git(hostile, "update-ref", "HEAD", signed)
    git(hostile, "log", "-1")
    assert marker.exists()  # the trap works: git as a user runs it falls into it
    marker.unlink()
    torn = make_repository(tmp_path / "torn")
    git(torn, "gc", "-q")
    for pack in (torn / ".git/objects/pack").glob("*.pack"):
        pack.chmod(0o644)
        pack.write_bytes(pack.read_bytes()[:200])
    unlicensed = make_repository(tmp_path / "unlicensed", licence="All rights reserved.\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    inputs = [hostile, torn, unlicensed, empty, tmp_path / "gone"]
    card = build(tmp_path / "out", *inputs, runs_code=False)
    assert not marker.exists()
    aside = [
        json.loads(line) for line in (tmp_path / "out/set_aside.jsonl").read_text().splitlines()
    ]
    reasons = {pathlib.Path(one["file"]).name: one["reason"] for one in aside}
    assert "licence" in reasons["unlicensed"] and "no git repository" in reasons["empty"]
    assert reasons["gone"] and reasons["torn"]
    records = {one["record"]: one["reason"] for one in aside if one["file"].endswith("hostile")}
    assert "LFS" in records["pointer.bin"] and "UTF-8" in records["latin.txt"]
    assert "bytes" in records["huge.txt"] and "generated" in records["made.py"]
    assert "vendored" in records["node_modules/a.js"] and "lines" in records["flat.js"]
    assert "link" in records["link"]
    assert [one["name"] for one in card["repositories"]] == ["hostile"]


def test_code_of_a_repository_runs_in_a_sandbox_only(tmp_path):
    marker = tmp_path / "ran"
    folder = make_repository(tmp_path / "evil")
    evil = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('x')\n"
    tests = f"{evil}import unittest\nfrom words import *\n\n\nclass A(unittest.TestCase):\n" + (
        "    def test_a(self):\n        self.assertEqual(count_words('a'), 1)\n"
    )
    commit(folder, "Add a test that writes outside", words_py=f"{evil}{WORDS}", test_evil_py=tests)
    build(tmp_path / "out", folder, commits=1)
    assert not marker.exists()


def test_attempts_at_evaluation_tasks_are_left_out_however_short_these_are(tmp_path):
    """The instruction of this family, to delete a file, has too few words to be searched for."""
    names = ("delete_named/1000000", "0.5*terminal#delete_named/1000001", "delete_named/7")
    for number, name in enumerate(names):
        one = trajectory(name, 1.0, f"I read note {number} and removed its file")
        save_trajectory(one, tmp_path / f"{number}.json")
    sets = ("terminal:delete_named:2",)
    card = build(tmp_path / "out", trajectories=str(tmp_path), evaluation_sets=sets)
    assert card["kinds"]["trajectory"]["contaminated"] == 2
    (kept,) = documents_of(tmp_path / "out")["trajectory"]
    assert kept["origin"]["task"] == "delete_named/7"


def test_names_that_are_no_lines_of_utf_8_end_no_run_and_name_no_other_files(tmp_path):
    folder = make_repository(tmp_path / os.fsdecode(b"odd\xff"))
    for path in ("two\nlines.py", "fine.py"):
        commit(folder, f"Add the file {path.split()[0]}", **{path: "x = 1\n" * 30})
    for path in ("two\nlines.py", "fine.py"):
        commit(folder, f"Change the file {path.split()[0]}", **{path: "x = 1\n" * 30 + "y = 2\n"})
    played = tmp_path / "played"
    played.mkdir()
    one = trajectory("mend the parser", 1.0, "I changed the right file of it")
    save_trajectory(one, played / os.fsdecode(b"odd\xff.json"))
    build(tmp_path / "out", folder, runs_code=False, trajectories=str(played))
    documents = documents_of(tmp_path / "out")
    assert len(documents["trajectory"]) == 1
    texts = [one["text"] for one in documents["localisation"]]
    assert sum("## Where to change the code\nfine.py" in text for text in texts) == 1
    assert not any("lines.py" in text for text in texts)


def test_a_partial_clone_gives_what_it_holds(tmp_path):
    folder = make_repository(tmp_path / "partial")
    blob = git(folder, "rev-parse", "HEAD:words.py").strip()
    (folder / ".git/objects" / blob[:2] / blob[2:]).unlink()
    card = build(tmp_path / "out", folder, runs_code=False)
    aside = (tmp_path / "out/set_aside.jsonl").read_text().splitlines()
    reasons = {one["record"]: one["reason"] for one in map(json.loads, aside)}
    assert "content is missing" in reasons["words.py"]
    assert card["kinds"]["file"]["made"] > 0


def test_what_a_failing_sandbox_kept_out_is_made_by_the_next_run(tmp_path, monkeypatch):
    folder = make_repository(tmp_path / "wordy")

    async def fail(self, files):
        raise SandboxError("the machine is full")

    with monkeypatch.context() as patch:
        patch.setattr(Runs, "_run_inside", fail)
        first = build(tmp_path / "out", folder)
    assert "tests" in first["kinds"] and first["kinds"]["tests"]["made"] == 0
    second = build(tmp_path / "out", folder)
    assert second["kinds"]["tests"]["made"] > 0 and second["kinds"]["steps"]["made"] > 0
    assert not any("sandbox failed" in one["reason"] for one in second["reasons"])


def trajectory(task, reward, words):
    ids = TOKENIZER.encode(words)
    end = [TOKENIZER.im_end]
    chunk = Chunk(
        prompt_ids=[TOKENIZER.im_start, *TOKENIZER.encode(f"user\n{task}")],
        action_ids=[*ids, *end],
        logprobs=[0.0] * (len(ids) + 1),
        text=words,
    )
    ending = "success" if reward else "failure"
    return Trajectory(task, "family", [chunk], reward, ending)


def test_trajectories_keep_failures_that_are_put_right_and_no_others(tmp_path):
    folder = tmp_path / "trajectories"
    folder.mkdir()
    made = {
        "a": trajectory("mend the parser", 0.0, "I changed the wrong file of this"),
        "b": trajectory("mend the parser", 1.0, "I changed the right file of it"),
        "c": trajectory("never solved by anyone", 0.0, "I gave up on all of this early"),
    }
    for name, one in made.items():
        save_trajectory(one, folder / f"{name}.json")
    (folder / "torn.json").write_text('{"schema_version": "ATIF')
    card = build(tmp_path / "out", trajectories=str(folder))
    documents = documents_of(tmp_path / "out")["trajectory"]
    assert card["counts"]["trajectories corrected"] == 1
    assert card["counts"]["trajectories left_out"] == 1 and card["set_aside"] == 1
    texts = [one["text"] for one in documents]
    assert not any("gave up" in text for text in texts)
    both = next(one for one in documents if one["origin"]["corrected"])
    assert both["text"].index("wrong file") < both["text"].index("right file")
    ids = document_ids(TOKENIZER, Text.of(both["text"], both["control"])).tolist()
    assert ids.count(TOKENIZER.im_start) == 2 and ids.count(TOKENIZER.im_end) == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_set(repository, built, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch.corpus", "--out", str(out), str(repository)]
    command += ["--evaluation_sets=", "--concurrency=1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(out.glob("units/*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    subprocess.run(command, cwd=ROOT, check=True, timeout=400, stdout=subprocess.DEVNULL)
    expected, _ = built
    for path in expected.glob("stage1/*.jsonl"):
        assert (out / "stage1" / path.name).read_bytes() == path.read_bytes()


PYTEST_TESTS = """\
import pytest

from words import count_words


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("a b c")
    return path.read_text()


@pytest.mark.parametrize("more", ["", " d"])
def test_count(text, more):
    assert count_words(text + more) == 3 + len(more.split())
"""


def test_a_step_of_a_parametrised_test_shows_the_function_of_the_test():
    texts = {"words.py": WORDS, "test_words.py": "import pytest\n\n\n" + PARAMETRISED}
    name = "test_words.py::test_count[a::b c-2]"
    step = steps.Step(name, (("words.py", "count_words"),))
    repository = Repository(pathlib.Path("wordy"), "wordy", "0" * 40, "MIT")
    document = steps._document(repository, texts, [step], 0)
    assert not isinstance(document, str), document
    shown = document.text.split("## Files")[0]
    assert "def test_count(text, count):" in shown and document.origin["test"] == name


def test_only_the_chosen_test_files_are_run(tmp_path):
    folder = make_repository(tmp_path / "wordy")
    more = "from words import split_words\n\n\ndef test_none():\n    assert split_words('') == []\n"
    commit(folder, "Test that an empty text has no words", checks__test_more_py=more)
    card = build(tmp_path / "some", folder, commits=0, test_files=("checks/*",))
    tests = [one["origin"]["test"] for one in documents_of(tmp_path / "some")["steps"]]
    assert tests == ["checks/test_more.py::test_none"]
    assert card["settings"]["test_files"] == ("checks/*",)
    none = build(tmp_path / "none", folder, commits=4, test_files=("other/*",))
    assert "tests" not in none["kinds"] and none["kinds"]["steps"]["made"] == 0
    assert "steps" in (tmp_path / "none" / "set_aside.jsonl").read_text()


@pytest.mark.slow
def test_tests_of_pytest_are_proven_with_packages_of_this_machine(tmp_path):
    folder = make_repository(tmp_path / "wordy")
    broken = WORDS.replace("len(words)", "len(text)")
    options = '[tool.pytest.ini_options]\naddopts = "--option-of-a-plugin-that-is-missing"\n'
    commit(folder, "Break it", words_py=broken, **{"pyproject.toml": options})
    commit(
        folder,
        "Count the words of a text, not its characters",
        words_py=WORDS,
        test_words_py=PYTEST_TESTS,
    )
    packages = sysconfig.get_paths()["purelib"]
    if asyncio.run(Runs("best_available", packages=packages).lacking([PYTEST_TESTS])):
        pytest.skip("the sandbox's python3 cannot import the pytest of this interpreter")
    without = build(tmp_path / "without", folder)["kinds"]["tests"]["made"]
    card = build(tmp_path / "with", folder, packages=packages)
    assert card["kinds"]["tests"]["made"] == without + 1
    made = documents_of(tmp_path / "with")["tests"]
    failing = [one["origin"]["fails_before"] for one in made if "not its characters" in one["text"]]
    assert failing == [["test_words.py::test_count[ d]", "test_words.py::test_count[]"]]
