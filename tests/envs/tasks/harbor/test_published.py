"""Tasks in the form in which they are published: their tests find what they install."""

import contextlib
import dataclasses
import http.server
import importlib.metadata
import pathlib
import shutil
import threading

import pytest

from envs.rock import SandboxConfig, SandboxError
from envs.tasks.harbor import HarborEnv, UnsupportedError, load_task
from tests.envs.tasks.harbor.conftest import CHECK, CONFIG, tb1
from tests.envs.tasks.harbor.playing import bash, oracle, play

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


@pytest.mark.long
@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if form == "uv" else pytest.mark.slow) for form in RUNS],
)
def test_tests_find_what_they_install_and_nothing_earns_nothing(tmp_path, run, config, form):
    task = load_task(tb1(tmp_path / "task", RUNS[form]))
    assert run(oracle(task, config)) == (1.0, "success")
    reward, info = run(play(task, config=config))
    assert reward == 0.0 and "FAILED" in info["test_output"], info


@pytest.mark.long
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


@pytest.mark.long
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


def test_a_config_for_another_backend_refuses_tools():
    with pytest.raises(ValueError, match="verifier_tools means nothing to backend='remote'"):
        SandboxConfig(backend="remote", url="http://x", verifier_tools="/x")
