"""Tasks in the form in which they are published: their tests find what they install."""

import contextlib
import dataclasses
import gzip
import http.server
import importlib.metadata
import itertools
import pathlib
import shutil
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.rock import SandboxConfig, SandboxError
from envs.tasks.harbor import HarborEnv, RewardError, TaskError, UnsupportedError, load_task
from envs.tasks.harbor.environment import limit_notes, sandbox_for
from envs.tasks.harbor.grade import terminal_bench_1_passed
from envs.tasks.harbor.installs import needs_of
from tests.envs.tasks.harbor.conftest import CONFIG, TB1, write
from tests.envs.tasks.harbor.playing import bash, observe, oracle, play

TB1_PREAMBLE = """\
#!/bin/bash
# Install curl
apt-get update
apt-get install -y curl

# Install uv
curl -LsSf https://astral.sh/uv/0.7.13/install.sh | sh

source $HOME/.local/bin/env

if [ "$PWD" = "/" ]; then
    echo "Error: No working directory set."
    exit 1
fi

uv venv .tbench-testing
source .tbench-testing/bin/activate
"""
TB2_TEST = """\
#!/bin/bash
set -e
apt-get update && apt-get install -y curl
curl -LsSf https://astral.sh/uv/0.9.5/install.sh | sh
source $HOME/.local/bin/env
set +e
if uvx -p 3.13 --with pytest==8.4.1 pytest /tests/test_outputs.py -rA; then
  echo 1 > /logs/verifier/reward.txt
else
  echo 0 > /logs/verifier/reward.txt
fi
"""
CHECK = """\
import pathlib, subprocess, sys

def test_the_file_is_there():
    assert pathlib.Path("/app/out.txt").read_text() == "x\\n"

def test_python_is_python3():
    assert subprocess.run(["python", "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A folder as `pip install --target` makes it, with this environment's pytest."""
    folder = tmp_path_factory.mktemp("tools") / "tools"
    folder.mkdir()
    for name in ("pytest", "pluggy", "iniconfig", "packaging"):
        distribution = importlib.metadata.distribution(name)
        tops = {pathlib.PurePath(file).parts[0] for file in distribution.files}
        for top in tops - {"..", "__pycache__"}:
            source = pathlib.Path(distribution.locate_file(top))
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / top)
    for place in (folder, *folder.parents[:-1]):  # the landlock tier enters it as another user
        with contextlib.suppress(PermissionError):
            place.chmod(place.stat().st_mode | 0o055)
    return folder


@pytest.fixture
def config(tools):
    return dataclasses.replace(CONFIG, verifier_tools=str(tools))


PYTEST = "pytest $TEST_DIR/test_outputs.py -rA"


def tb1(folder, run_tests, **files):
    plain = {
        **TB1,
        "Dockerfile": "FROM ghcr.io/laude-institute/t-bench/python-3-13:20250620\n",
        "run-tests.sh": run_tests,
        "tests/test_outputs.py": CHECK,
    }
    return write(folder, {**plain, **files})


RUNS = {
    "uv": f"{TB1_PREAMBLE}uv pip install pytest==8.4.1\nuv run {PYTEST}\n",
    "python": f"{TB1_PREAMBLE}uv pip install pytest\npython -m {PYTEST}\n",
    "project": f"{TB1_PREAMBLE}uv init\nuv add pytest==8.4.1\nuv run {PYTEST} -v\n",
    "pip": "#!/bin/bash\npip install pytest==8.4.1\ncd $TEST_DIR\npytest test_outputs.py -rA\n",
    "module": (
        "python3 -m pip install -q pytest\ncd $TEST_DIR\npython3 -m pytest test_outputs.py -rA\n"
    ),
    "by path": (
        "apt-get install -y wget\nwget -qO- https://astral.sh/uv/install.sh | sh\n"
        f"/root/.local/bin/uv pip install pytest\n/root/.local/bin/uv run {PYTEST}\n"
    ),
}


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if form == "uv" else pytest.mark.slow) for form in RUNS],
)
def test_tests_find_what_they_install_and_nothing_earns_nothing(tmp_path, run, config, form):
    task = load_task(tb1(tmp_path / "task", RUNS[form]))
    assert run(oracle(task, config)) == (1.0, "success")
    reward, info = run(play(task, config=config))
    assert reward == 0.0 and "FAILED" in info["test_output"], info


def test_tests_of_terminal_bench_2_find_uvx(harbor, run, config):
    task = load_task(
        harbor(
            {
                "tests/test.sh": TB2_TEST,
                "tests/test_outputs.py": CHECK,
                "environment/Dockerfile": "FROM python:3.13-slim\nWORKDIR /app\n",
            }
        )
    )
    assert run(oracle(task, config)) == (1.0, "success")
    assert run(play(task, config=config))[0] == 0.0


TRICKS = {
    "venv": (
        "mkdir -p .tbench-testing/bin"
        " && echo 'pytest() { true; }; exit 0' > .tbench-testing/bin/activate"
    ),
    "installer": (
        "mkdir -p /root/.local/bin; for n in uv uvx env python pytest; do printf '#!/bin/sh\\necho"
        " === short test summary info ===; echo PASSED a::b; exit 0' > /root/.local/bin/$n;"
        " chmod +x /root/.local/bin/$n; done"
    ),
    "settings": (
        "for d in / /app; do printf '[pytest]\\naddopts = --co -p no:terminal\\n' > $d/pytest.ini;"
        " echo 'import os; os._exit(0)' > $d/conftest.py; done"
    ),
    "modules": (
        "printf '[tool.pytest.ini_options]\\naddopts = \"--co\"\\n' > pyproject.toml; for m in"
        " pathlib pytest _pytest pluggy; do echo 'import os; os._exit(0)' > $m.py; done"
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("installer", "settings") else pytest.mark.slow)
        for name in TRICKS
    ],
)
def test_nothing_an_agent_leaves_stands_for_the_tools(tmp_path, run, config, name):
    form = "module" if name == "settings" else "uv"
    task = load_task(tb1(tmp_path / "task", RUNS[form]))
    assert run(play(task, TRICKS[name], config=config))[0] == 0.0


def test_agents_see_no_tools(tmp_path, run, config):
    task = load_task(tb1(tmp_path / "task", RUNS["uv"]))

    async def episode():
        env = HarborEnv(task, config)
        try:
            await env.areset()
            return (await env.astep(bash("ls /run $VERIFIER_TOOLS; python3 -m pytest; which uv")))[
                0
            ]
        finally:
            await env.aclose()

    seen = run(episode())
    assert "No module named pytest" in seen and "tools" not in seen and "uv" not in seen


@pytest.mark.parametrize(
    ("script", "line", "says"),
    [
        (
            TB1_PREAMBLE + "uv pip install pytest 'no_such.Package[x]==1.2' other-one\n",
            18,
            r"lack no-such-package==1.2 other-one; add it with `pip install --target \S+tools"
            r" no-such-package==1.2 other-one`, or let the tests install it by verifier_egress",
        ),
        ("true\nuvx ruff@0.1 check\n", 2, "lack ruff==0.1"),
        ("uv run --with pytest-none pytest -rA\n", 1, "lack pytest-none"),
        ("pip install -r /tests/requirements.txt\n", 1, "lack 'from-file>=2'"),
        ("apt-get install -y \\\n  git no-such-program\n", 2, "this machine lacks no-such-program"),
        ("pip install ./wheel.whl\n", 1, "needs the network"),
        ("npm ci\n", 1, "needs the network"),
    ],
)
def test_what_the_tools_lack_is_refused_by_name_before_anyone_plays(
    tmp_path, run, config, script, line, says
):
    files = {"tests/requirements.txt": "# pinned\nfrom_file>=2 ; python_version > '3'\n"}
    task = load_task(tb1(tmp_path / "task", script, **files))
    with pytest.raises(UnsupportedError, match=says) as caught:
        run(play(task, config=config))
    assert caught.value.line == line and caught.value.file.name == "run-tests.sh"


def test_without_tools_the_folder_to_make_is_named(tmp_path, run):
    task = load_task(tb1(tmp_path / "task", RUNS["pip"]))
    with pytest.raises(UnsupportedError, match=r"pip install --target ~/.rock/tools pytest==8.4.1"):
        run(play(task))


def test_a_package_for_another_python_is_refused_and_another_version_noted(tmp_path, run, config):
    tools = tmp_path / "tools"
    shutil.copytree(config.verifier_tools, tools)
    (tools / "built-1.dist-info").mkdir()
    (tools / "built-1.dist-info" / "METADATA").write_text("Name: built\nVersion: 1\n")
    (tools / "built-1.dist-info" / "RECORD").write_text("built.cpython-30-x86_64-linux-gnu.so,,\n")
    (tools / "built.cpython-30-x86_64-linux-gnu.so").write_bytes(b"")
    config = dataclasses.replace(config, verifier_tools=str(tools))
    script = "pip install pytest==1.0 {}\npytest -rA $TEST_DIR\n"
    with pytest.raises(UnsupportedError, match="have for another Python built"):
        run(play(load_task(tb1(tmp_path / "a", script.format("built"))), config=config))

    async def notes():
        env = HarborEnv(load_task(tb1(tmp_path / "b", script.format(""))), config)
        try:
            return (await env.areset())[1]["notes"]
        finally:
            await env.aclose()

    version = importlib.metadata.version("pytest")
    assert f"the tests ask for pytest==1.0 and have {version}" in run(notes())


def test_a_python_among_the_tools_comes_before_the_sandboxes_own(harbor, run, config, tmp_path):
    tools = tmp_path / "tools"
    shutil.copytree(config.verifier_tools, tools)
    (tools / "python" / "bin").mkdir(parents=True)
    python = tools / "python" / "bin" / "python3"
    python.write_text('#!/bin/sh\nOF_TOOLS=1 exec /usr/bin/python3 "$@"\n')
    python.chmod(0o755)
    for place in (tmp_path, tools):
        place.chmod(0o755)
    check = "import os; print(os.environ.get('OF_TOOLS', 0))"
    test = f'uv run python -c "{check}" > /logs/verifier/reward.txt\n'
    task = load_task(harbor({"tests/test.sh": test}))
    other = dataclasses.replace(config, verifier_tools=str(tools))
    assert run(play(task, config=other))[0] == 1.0
    assert run(play(task, config=config))[0] == 0.0


@pytest.fixture
def package_index():
    """A port of this host that serves an installer, as a package index does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"mkdir -p $HOME/bin; echo 'echo installed' > $HOME/bin/tool\n")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_verifier_egress_lets_the_tests_install_and_the_agent_reach_nothing(
    harbor, run, package_index
):
    fetch = f"curl -sf --max-time 5 http://index.example:{package_index}/install.sh"
    test = (
        f'{fetch} | bash; [ "$(bash $HOME/bin/tool)" = installed ] && [ -e /app/tried ] &&'
        " [ ! -s /app/got ] && echo 1 > /logs/verifier/reward.txt\n"
    )
    task = load_task(harbor({"tests/test.sh": test}))
    agent = f"{fetch} > /app/got; touch /app/tried"
    with pytest.raises(UnsupportedError, match=r"`curl .*needs the network"):
        run(play(task, agent))
    try:
        grant = f"index.example@127.0.0.1:{package_index}"
        reward, info = run(play(task, agent, verifier_egress=(grant,)))
    except SandboxError as error:
        pytest.skip(f"no sandbox here can be granted a host: {error}")
    assert reward == 1.0, info


# -- Base images and build contexts
# -------------------------------------------------------------------------------------------------


def test_base_images_begin_in_their_own_folder_and_python_is_there(tmp_path, run):
    dockerfile = (
        "FROM ghcr.io/laude-institute/t-bench/python-3-13:20250620\nCOPY task-deps/data.csv ./\n"
        "RUN python -c 'print(40 + 2)' > answer\n"
    )
    folder = tb1(
        tmp_path / "task", "true\n", Dockerfile=dockerfile, **{"task-deps/data.csv": "1\n"}
    )
    shown = observe(load_task(folder), "cat /app/data.csv /app/answer; pwd; python -V")
    assert "1\n42\n/app\nPython 3" in shown[0], shown


def test_installs_that_are_there_already_are_done(harbor):
    dockerfile = (
        "FROM ghcr.io/laude-institute/t-bench/ubuntu-24-04:20250624\n"
        "RUN apt-get update && \\\n    apt-get install -y python3-pip git && \\\n"
        "    ln -s /usr/bin/python3 /usr/bin/python && \\\n    rm -rf /var/lib/apt/lists/*\n"
        "RUN pip3 install --break-system-packages pytest==8.4.1 && echo done > /app/done\n"
        "RUN curl -LsSf https://astral.sh/uv/install.sh | sh\nRUN /root/.local/bin/uv init\n"
    )
    shown = observe(
        harbor({"environment/Dockerfile": dockerfile}),
        "cat /app/done; python -V; ls -A /workspace; uv",
    )[0]
    assert shown.startswith("done\nPython 3") and ".rock-shims" not in shown, shown
    assert "uv: command not found" in shown


def test_a_build_copies_tests_only_where_it_names_them(tmp_path):
    everything = "FROM ubuntu\nWORKDIR /app\nCOPY . .\n"
    folder = tb1(tmp_path / "a", "true\n", Dockerfile=everything)
    assert "tests" not in observe(load_task(folder), "ls /app")[0]
    named = "FROM ubuntu\nWORKDIR /app\nCOPY tests/test_outputs.py run-tests.sh ./\n"
    folder = tb1(tmp_path / "b", "true\n", Dockerfile=named)
    shown = observe(load_task(folder), "ls /app")[0]
    assert "test_outputs.py" in shown and "run-tests.sh" in shown and "solution.sh" not in shown


def test_an_arg_before_from_and_the_arguments_of_the_platform_are_filled_in(harbor):
    dockerfile = (
        "ARG V=24.04\nARG W=w\nFROM ubuntu:$V\nARG V\nARG U\nARG TARGETOS\nARG X='a b'\nENV X2=$X\n"
        'RUN mkdir /app && echo "[$V][$W][${U-unset}][$TARGETOS][$X2]" > /app/seen\n'
    )
    shown = observe(harbor({"environment/Dockerfile": dockerfile}), "cat /app/seen")[0]
    assert "[24.04][][unset][linux][a b]" in shown


def test_a_stage_that_nothing_comes_from_is_left_out(harbor):
    dockerfile = "FROM nvidia/cuda:12\nRUN make\nFROM ubuntu\nWORKDIR /app\nRUN echo last > f\n"
    assert "last" in observe(harbor({"environment/Dockerfile": dockerfile}), "cat /app/f")[0]


def test_limits_of_a_task_are_kept_where_they_can_be_and_said_where_not(harbor):
    text = "[environment]\nmemory_mb = 2048\nstorage_mb = 10240\ncpus = 4\n"
    task = load_task(harbor({"task.toml": text}))
    config = sandbox_for(task, CONFIG)
    assert (config.memory_mb, config.disk_mb, config.cpus) == (2048, 1024, 4)
    assert limit_notes(task, config) == ["environment.storage_mb = 10240, and the sandbox has 1024"]
    given = sandbox_for(task, dataclasses.replace(CONFIG, memory_mb=512, disk_mb=300))
    assert (given.memory_mb, given.disk_mb, given.pids) == (512, 300, 256)
    longer = task.with_more_time(2)
    assert longer.steps[0].verifier_timeout == 2 * task.steps[0].verifier_timeout
    assert longer.environment.build_timeout == 2 * task.environment.build_timeout


# -- How scripts run
# -------------------------------------------------------------------------------------------------


def test_scripts_run_by_their_own_first_line(harbor, run):
    files = {
        "tests/test.sh": (
            "#!/usr/bin/env python3\nimport pathlib\n"
            "reward = int(pathlib.Path('/app/out.txt').exists())\n"
            "pathlib.Path('/logs/verifier/reward.txt').write_text(str(reward))\n"
        ),
        "solution/solve.sh": "#!/usr/bin/python3\nopen('/app/out.txt', 'w').write('x')\n",
    }
    folder = harbor(files)
    assert run(oracle(load_task(folder))) == (1.0, "success")
    assert run(play(load_task(folder)))[0] == 0.0


@pytest.mark.parametrize("name", ["tests/test.sh", "solution/solve.sh"])
def test_scripts_with_crlf_are_named_with_their_line(harbor, name):
    folder = harbor({name: "#!/bin/sh\ntrue\r\n"})
    with pytest.raises(TaskError, match="CRLF") as caught:
        load_task(folder)
    assert caught.value.line == 2 and caught.value.file == folder / name


# -- Terminal-Bench 1's parser
# -------------------------------------------------------------------------------------------------


HEADING = "=========================== short test summary info ===========================\n"


# The rule is that of terminal_bench 0.2.18: parsers/pytest_parser.py, and _is_resolved of
# harness/harness.py. What it says of each text was taken from there.
@pytest.mark.parametrize(
    ("output", "passed"),
    [
        (f"{HEADING}PASSED t.py::a\nPASSED t.py::b\n=== 2 passed in 0.01s ===\n", True),
        (f"{HEADING}PASSED t.py::a\nFAILED t.py::b - assert 1 == 2\n", False),
        (f"{HEADING}PASSED t.py::a\nERROR t.py::b - boom\n", False),
        (f"{HEADING}SKIPPED [1] t.py:3: no network\nPASSED t.py::a\n", True),
        (f"{HEADING}XFAIL t.py::a - known\n", True),
        (f"{HEADING}XPASS t.py::a\n", False),
        (f"{HEADING}FAILED t.py::a - x\nPASSED other.py::a\n", True),
        (f"{HEADING}FAILED t.py::a[- - ] - x\nPASSED t.py::b\n", False),
        (f"=Short Test Summary Info=\nPASSED a::b\n{HEADING}FAILED a::c\n", False),
        (
            f"\x1b[36m\x1b[1m{HEADING.strip()}\x1b[0m\n"
            "\x1b[32mPASSED\x1b[0m t.py::\x1b[1ma\x1b[0m\n",
            True,
        ),
        (f"FAILED before\n{HEADING}PASSED: t.py::a\nPASSED\nnoise\n", True),
    ],
)
def test_outcomes_are_read_as_terminal_bench_reads_them(output, passed):
    assert terminal_bench_1_passed(output) is passed


@pytest.mark.parametrize("output", ["", "2 passed\n", f"{HEADING}no test\n"])
def test_without_a_test_in_a_summary_there_is_no_verdict(output):
    with pytest.raises(RewardError, match="summary"):
        terminal_bench_1_passed(output)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["PASSED", "FAILED", "SKIPPED", "XFAIL", "XPASS", "ERROR"]),
            st.sampled_from(["a", "b", "c", "d[x]"]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_the_last_outcome_of_each_test_counts(outcomes, coloured):
    paint = "\x1b[31m{}\x1b[0m" if coloured else "{}"
    rows = [f"{paint.format(status)} t.py::{name}" for status, name in outcomes]
    last = {name: status for status, name in outcomes}
    expected = all(status in ("PASSED", "SKIPPED", "XFAIL") for status in last.values())
    assert terminal_bench_1_passed(HEADING + "\n".join(rows)) is expected


def test_a_summary_that_is_longer_than_an_output_counts_and_the_exit_code_does_not(tmp_path, run):
    rows = 3000
    script = (
        f"echo '{HEADING.strip()}'\n"
        f'for i in $(seq {rows}); do echo "PASSED tests/test_outputs.py::test_row[$i]"; done\n'
    )
    task = load_task(tb1(tmp_path / "a", f"{script}exit 1\n"))
    assert run(play(task))[0] == 1.0
    one_fails = script.replace("done\n", "done\n", 1).replace(
        "seq 3000); do", "seq 3000); do [ $i = 7 ] && echo 'FAILED a::x';"
    )
    assert run(play(load_task(tb1(tmp_path / "b", one_fails))))[0] == 0.0


def test_nothing_that_the_tests_print_stands_for_the_summary(tmp_path, run):
    forged = gzip.compress(f"{HEADING}PASSED a::b\n".encode()).hex()
    script = f"echo {forged}\nprintf 'x'\nexit 0\n"
    reward, info = run(play(load_task(tb1(tmp_path / "task", script))))
    assert reward == 0.0 and "short test summary is not in the output" in info["note"]


# -- What scripts need
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("apt-get update\napt-get install -y -q git=1:2 jq", ["git", "jq"]),
        ("sudo -E apt install -y \\\n  libx \\\n  liby 2> /dev/null", ["libx", "liby"]),
        ("if ! command -v uv; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi", []),
        ("apt-get install -y curl; curl http://localhost:80/", ["curl"]),
        ("apt-get install -y curl; curl -L https://astral.sh/uv/install.sh | sh", []),
        ("pip install -q --no-cache-dir 'A.b[x]>=1,<2' -i https://i/ c", ["a-b>=1,<2", "c"]),
        ("python3.12 -m pip install --break-system-packages x==1", ["x==1"]),
        ("pip install -U pip setuptools wheel uv", []),
        (
            "uvx -p 3.13 -w pytest==8.4.1 --with a,b pytest -rA",
            ["pytest==8.4.1", "a", "b", "pytest"],
        ),
        ("uv tool run --from x y", ["x"]),
        ("uv run python3 -m pytest -q", ["pytest"]),
        ("X=$(pip install y) && cd / && . .venv/bin/activate", ["y"]),
        ("pip install --no-index z", []),
        ("cat > x.sh <<'EOF'\npip install y\nEOF\n# pip install z\necho pip install", []),
        ("grep install apt; aptitude; uv --version; uv venv a; git clone /app b; curl $URL", []),
        ("wget http://a.b/c", ["network"]),
        ("git clone https://a/b", ["network"]),
        ("npm ci", ["network"]),
        ("uv sync", ["network"]),
        ("pip install .", ["network"]),
        ("pip install -r elsewhere.txt", ["network"]),
        ("pip install git+https://a/b", ["network"]),
    ],
)
def test_what_a_script_installs(script, found):
    needs = needs_of(script)
    assert [f"{need.name}{need.version}" or need.kind for need in needs] == found


SHELL = """
apt-get install -y pip uv run uvx -w --with pytest python -m ; && | \\\\ # << EOF ' " $( ) { } if
then sudo curl https://a/b -r x -e . $X
"""
WORDS = ["\n", *SHELL.split()]


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), max_size=30))
def test_any_text_has_needs_with_lines(words):
    text = " ".join(words)
    lines = max(1, len(text.splitlines()))
    for need in itertools.islice(needs_of(text), 50):
        assert 1 <= need.line <= lines and need.kind in ("system", "python", "network")


def test_a_config_for_another_backend_refuses_tools():
    with pytest.raises(ValueError, match="verifier_tools means nothing to backend='remote'"):
        SandboxConfig(backend="remote", url="http://x", verifier_tools="/x")
