"""Approval: modes, and rules on files, hosts and servers, also where a command leaves a folder."""

import os

import pytest

from rome.agent.iflow.approval.policy import Policy
from rome.agent.iflow.approval.rules import parse_rule
from tests.rome.agent.iflow.policies import (
    EDIT,
    FETCH,
    READ,
    SHELL,
    TODO,
    WRITE,
    decide,
    policy,
    tool,
)


def test_modes_and_files():
    def verdict(mode, which, path):
        return policy(mode=mode).judge(which, {"path": path}).decision

    for mode in ("plan", "default", "accept_edits", "yolo"):
        assert verdict(mode, READ, "src/x.py") == "allow"
        assert verdict(mode, TODO, "") == "allow"
    assert verdict("default", READ, "/etc/passwd") == "ask"
    assert verdict("default", READ, "../x") == "ask"
    assert verdict("plan", EDIT, "src/x.py") == "deny"
    assert verdict("default", EDIT, "src/x.py") == "ask"
    assert verdict("accept_edits", EDIT, "src/x.py") == "allow"
    for path in ("../x", "/etc/passwd", ".git/hooks/pre-commit", "a/.GIT/config", ".iflow/x"):
        assert verdict("accept_edits", WRITE, path) == "ask", path
    assert verdict("yolo", WRITE, "/etc/passwd") == "allow"


def test_a_rule_on_files_holds_for_all_tools_of_its_kind():
    rules = policy(allow=["Edit(src/**)"], deny=["Edit(src/secret/**)"])
    assert rules.judge(WRITE, {"path": "src/a/b.py"}).decision == "allow"
    assert rules.judge(EDIT, {"path": "./src/../src/a.py"}).decision == "allow"
    assert rules.judge(WRITE, {"path": "src/secret/b.py"}).decision == "deny"
    assert rules.judge(WRITE, {"path": "src/../b.py"}).decision == "ask"
    assert rules.judge(WRITE, {"path": "x/src/a.py"}).decision == "ask"


def test_a_link_out_of_the_project_is_outside(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "link").symlink_to("/etc")
    rules = Policy(root=str(project), mode="accept_edits", follow=os.path.realpath)
    assert rules.judge(READ, {"path": "link/passwd"}).decision == "ask"
    assert rules.judge(WRITE, {"path": "link/x"}).decision == "ask"
    assert rules.judge(SHELL, {"command": "cat ./link/passwd"}).decision == "ask"
    assert rules.judge(WRITE, {"path": "plain"}).decision == "allow"
    denied = Policy(
        root=str(project), mode="yolo", follow=os.path.realpath, deny=["read_file(/etc/**)"]
    )
    assert denied.judge(READ, {"path": "link/passwd"}).decision == "deny"


def test_hosts_and_servers():
    rules = policy(allow=["WebFetch(domain:example.org)", "mcp__github__get_*"], deny=["mcp__evil"])
    for url, decision in {
        "https://example.org/x": "allow",
        "https://api.example.org": "allow",
        "https://example.org.evil.com": "ask",
        "https://notexample.org": "ask",
        "https://example.org@evil.com": "ask",
        "https://[": "ask",
    }.items():
        assert rules.judge(FETCH, {"url": url}).decision == decision, url
    assert rules.judge(tool("github__get_issue", "unknown"), {}).decision == "allow"
    assert rules.judge(tool("github__close_issue", "unknown"), {}).decision == "ask"
    assert rules.judge(tool("evil__x", "unknown"), {}).decision == "deny"
    assert policy(servers=["a"]).judge(tool("a__x", "unknown"), {}).decision == "allow"


def test_allow_always_adds_a_rule_that_allows_the_same_and_no_more():
    kept = []
    rules = policy(keep_rule=kept.append)
    for line, rule, other in [
        ("git push origin main", "shell(git push:*)", "git pull"),
        ("terraform plan", "shell(terraform:*)", "tofu plan"),
        ("python train.py --fast", "shell(python train.py --fast)", "python train.py"),
        ("python3.11 x.py", "shell(python3.11 x.py)", "python3.11 y.py"),
    ]:
        verdict = rules.judge(SHELL, {"command": line})
        assert (verdict.decision, verdict.rule) == ("ask", rule)
        rules.add_rule(verdict.rule, "project")
        assert rules.judge(SHELL, {"command": line}).decision == "allow"
        assert rules.judge(SHELL, {"command": other}).decision == "ask"
    assert len(kept) == 4
    for line in ["git push > x", "sudo ls", "A=b x", "./run", "x $y", "x; y", "bash -c 'x y'"]:
        verdict = policy().judge(SHELL, {"command": line})
        assert verdict.rule == "" or line.startswith("bash"), line
    edit = policy().judge(EDIT, {"path": "src/a.py"})
    assert edit.rule == "edit(src/**)"


def test_a_wrong_rule_or_mode_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"rule 'shell\(git' must be of the form"):
        parse_rule("shell(git")
    with pytest.raises(ValueError, match="mode 'free' unknown; known: plan, default"):
        Policy(mode="free")


@pytest.mark.parametrize(
    "line",
    ["cat ~root/x", "cat {/etc/passwd,a}", "cat {a,{..,b}/x}", "git stash", "git worktree"],
)
def test_what_leaves_the_project_or_writes_is_no_reading(line):
    assert decide(line) == "ask" and decide(line, mode="plan") == "deny"


@pytest.mark.parametrize(
    "line",
    [
        "cd secrets && cat key",
        "cd secrets; cat ./key",
        "(cd secrets && cat <key)",
        "cd a; cd ../secrets; cat key",
        "cat {secrets,a}/key",
        "cat s*/key",
        "cat secret?/k*",
    ],
)
@pytest.mark.parametrize("mode", ["default", "yolo"])
def test_a_denied_folder_is_not_reached_by_a_detour(line, mode):
    assert decide(line, deny=["Read(secrets/**)"], mode=mode) in ("ask", "deny")
    assert decide(line, mode="yolo") == "allow"


def test_the_home_of_another_user_is_outside(monkeypatch):
    monkeypatch.setattr("posixpath.expanduser", lambda path: path.replace("~root", "/root"))
    for mode, path in [("accept_edits", "~root/.bashrc"), ("default", "~root"), ("plan", "~no/x")]:
        assert policy(mode=mode).judge(READ, {"path": path}).decision == "ask"
    assert policy(mode="accept_edits").judge(WRITE, {"path": "~root/x"}).decision == "ask"
    denied = policy(mode="yolo", deny=["Read(/root/**)"])
    assert denied.judge(READ, {"path": "~root/.ssh/id"}).decision == "deny"


def test_the_directory_of_the_shell_counts():
    rules = policy(mode="accept_edits", deny=["Read(secrets/**)"])
    cat = {"command": "cat key"}
    assert rules.judge(SHELL, cat, "/repo/a").decision == "allow"
    assert rules.judge(SHELL, cat, "/etc").decision == "ask"
    assert rules.judge(SHELL, cat, "/repo/secrets").decision == "deny"
    write = {"command": "echo x > post-checkout"}
    assert rules.judge(SHELL, write, "/repo").decision == "allow"
    assert rules.judge(SHELL, write, "/repo/.git/hooks").decision == "ask"
    both = {"command": "cd .git/hooks && echo x > post-checkout"}
    assert rules.judge(SHELL, both).decision == "ask"


def test_words_that_only_look_like_a_detour_are_allowed():
    for line in ["cd src && cat a.py", "ls {src,tests}", "cat a{1,2}.txt", "cat src/*.py", "ls *"]:
        assert decide(line, deny=["Read(secrets/**)"]) == "allow", line


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("grep -rn key .", "ask"),
        ("grep --recursive key", "ask"),
        ("rg key", "ask"),
        ("tar czf /tmp/all.tgz .", "ask"),
        ("cp -r . /tmp/copy", "ask"),
        ("cd sub && grep -r key ..", "ask"),
        ('cd "$somewhere" && cat key', "ask"),
        ("pushd secrets && cat key", "deny"),
        ('pushd "$x" && cat key', "ask"),
        ("grep -rn key sub", "allow"),
        ("tar cf /tmp/sub.tar -C sub x", "allow"),
        ("grep key a.txt", "allow"),
        ("cp a.txt b.txt", "allow"),
    ],
)
def test_what_reads_all_of_a_folder_with_a_denied_file_is_asked_for(tmp_path, command, expected):
    for name in ("secrets/key", "sub/x", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("key")
    rules = Policy(
        root=str(tmp_path), mode="yolo", deny=["Read(secrets/**)"], follow=os.path.realpath
    )
    assert rules.judge(SHELL, {"command": command}).decision == expected
    free = Policy(root=str(tmp_path), mode="yolo", follow=os.path.realpath)
    assert free.judge(SHELL, {"command": command}).decision == "allow"
