"""A task's network policy; and its real Dockerfile, built and played on the Docker backend."""

import asyncio
import contextlib
import dataclasses
import pathlib
import socket
import threading

import pytest

from envs.rock import SandboxConfig
from envs.rock.images import local
from envs.tasks.harbor import BuildError, HarborEnv, TaskError, UnsupportedError, load_task
from envs.tasks.harbor.containers import build_image
from envs.tasks.harbor.environment import egress_of, sandbox_for
from tests.envs.tasks.harbor.conftest import CONFIG, PASSES
from tests.envs.tasks.harbor.playing import bash, oracle, play, with_links


def with_network(harbor, text, name="task"):
    return load_task(harbor({"task.toml": f'version = "1.0"\n{text}\n'}, name=name))


def test_a_tasks_network_mode_becomes_the_sandboxes_egress(harbor):
    closed, public = (
        with_network(harbor, '[environment]\nnetwork_mode = "no-network"', "a"),
        with_network(harbor, "", "b"),
    )
    listed = with_network(
        harbor,
        '[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["pypi.org",'
        ' "*.example.org:8443"]',
        "c",
    )
    given = SandboxConfig(egress=("pypi.org:443",))
    assert (
        sandbox_for(closed, given).egress == ()
        and sandbox_for(public, given).egress == given.egress
        and sandbox_for(public, None).egress == ()
    )
    assert sandbox_for(listed, given).egress == (
        "pypi.org:443",
        "pypi.org:80",
        "*.example.org:8443",
    )
    assert (
        sandbox_for(listed, dataclasses.replace(given, memory_mb=999)).egress
        == sandbox_for(listed, given).egress
    )  # whoever sets the limits


def test_a_policy_that_cannot_be_enforced_is_refused_by_name(harbor, run):
    bad = with_network(
        harbor, '[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["not a host"]', "a"
    )
    with pytest.raises(TaskError, match="allowed_hosts: egress grant 'not a host:443'"):
        egress_of(bad)
    other = with_network(
        harbor,
        '[verifier]\nnetwork_mode = "public"\n[environment]\nnetwork_mode = "no-network"',
        "b",
    )
    with pytest.raises(
        UnsupportedError,
        match=r"verifier.network_mode = 'public' beside environment.network_mode = 'no-network'",
    ):
        run(play(other))
    same = with_network(
        harbor,
        '[agent]\nnetwork_mode = "no-network"\n[environment]\nnetwork_mode = "no-network"',
        "c",
    )
    assert run(play(same, "touch /app/out.txt"))[0] == 1.0
    closed_agent = with_network(harbor, '[agent]\nnetwork_mode = "no-network"', "d")
    assert (
        run(play(closed_agent, "touch /app/out.txt"))[0] == 1.0
    )  # public tasks reach nothing here
    granted = dataclasses.replace(CONFIG, egress=("x.invalid:443",))
    with pytest.raises(UnsupportedError, match=r"agent.network_mode = 'no-network' beside"):
        run(play(closed_agent, config=granted))
    with pytest.raises(
        UnsupportedError, match=r"build_egress = pypi.org:443.*all of the network or none"
    ):
        run(build_image(same, SandboxConfig(backend="docker", image="x"), ("pypi.org:443",)))


def test_a_host_that_is_not_allowed_is_denied_and_one_that_is_allowed_is_not(harbor, run):
    """The guard of the sandbox does this; that the task's words reach it is what is seen here."""
    task = with_network(
        harbor, '[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["allowed.invalid"]'
    )

    async def episode():
        env = HarborEnv(task, CONFIG)
        try:
            await env.areset()
            if env._sandbox.tier != "namespaces":
                pytest.skip("only the namespaces tier has a guard")
            await env.astep(
                bash(
                    "timeout 5 bash -c ': < /dev/tcp/192.0.2.1/443'; timeout 5 bash -c ': <"
                    " /dev/tcp/other.invalid/443'; timeout 5 bash -c ': <"
                    " /dev/tcp/allowed.invalid/443'"
                )
            )
            return [denial.destination for denial in await env._sandbox.denials()]
        finally:
            await env.aclose()

    seen = run(episode())
    assert (
        "192.0.2.1" in seen
        and any("other.invalid" in one for one in seen)
        and not any("allowed.invalid" in one for one in seen)
    )


@pytest.fixture
def files_server():
    """A port on this host that tells everybody one line."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as caller:
                    caller.sendall(b"from outside\n")

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR), server.close()


def test_build_steps_reach_what_the_config_grants_them_and_the_agent_and_the_tests_do_not(
    harbor, run, files_server
):
    fetch = f"timeout 5 bash -c 'cat < /dev/tcp/files/{files_server}'"
    folder = harbor(
        {
            "task.toml": 'version = "1.0"\n[environment]\nnetwork_mode = "no-network"\n',
            "environment/Dockerfile": f"FROM ubuntu\nWORKDIR /app\nRUN {fetch} > got\n",
            "tests/test.sh": (
                f'{fetch} > /app/graded; [ -s /app/graded ]; echo "$? != 0" | grep -c "^1" >'
                " /logs/verifier/reward.txt\n"
            ),
        }
    )

    async def episode(**options):
        env = HarborEnv(folder, CONFIG, **options)
        try:
            await env.areset()
            if env._sandbox.tier != "namespaces":
                pytest.skip("only the namespaces tier can grant")
            seen = [(await env.astep(bash(command)))[0] for command in ("cat got", fetch)]
            return (
                seen,
                (await env._sandbox.get_status()).network_denials,
                (await env.astep("done"))[1],
            )
        finally:
            await env.aclose()

    grant = (f"files@127.0.0.1:{files_server}",)
    for _ in range(2):  # the second from the snapshot of the first
        seen, denials, reward = run(episode(build_egress=grant))
        assert (
            seen[0] == "from outside"
            and "from outside" not in seen[1]
            and denials > 0
            and reward == 1.0
        )
    with pytest.raises(BuildError, match="RUN ended with exit"):
        run(episode(build_egress=()))


@pytest.mark.slow
@pytest.mark.docker
def test_a_real_dockerfile_is_built_once_and_the_oracle_earns_1_there(harbor, run, engine):
    config = SandboxConfig(backend="docker", image=engine.image, isolation="best_available")
    files = {
        "environment/Dockerfile": (
            f"FROM {engine.image}\nCOPY mktemp base64 /usr/bin/\nRUN chmod 755 /usr/bin/mktemp"
            " /usr/bin/base64\nENV GREETING=hello\nWORKDIR /app\nCOPY a.txt b/\nRUN echo made >"
            " made.txt && mkdir -p /srv/data && echo x > /srv/data/x\n"
        ),
        "environment/a.txt": "a\n",
        **{
            f"environment/{name}": pathlib.Path(f"/usr/bin/{name}").read_bytes()
            for name in ("mktemp", "base64")
        },  # which grading needs
        "task.toml": 'version = "1.0"\n[environment]\nnetwork_mode = "no-network"\n',
        # Answered by the stand-ins of toolchain.py: a container has no network either.
        "tests/test.sh": f"#!/bin/bash\nset -e\napt-get install -y grep\n{PASSES}",
    }
    folder = harbor(files)
    wanting = harbor({**files, "tests/test.sh": "apt-get install -y no-such\n"}, name="wanting")
    with pytest.raises(UnsupportedError, match="the task's image lacks no-such"):
        run(play(wanting, config=config))

    async def look():
        env = HarborEnv(folder, config)
        try:
            await env.areset()
            first = [
                (await env.astep(bash(command)))[0]
                for command in (
                    "pwd; cat b/a.txt made.txt /srv/data/x; echo $GREETING",
                    "ls /tests /solution; touch /etc/x; touch /srv/data/y && ls /srv/data",
                )
            ]
            return first, env.built
        finally:
            await env.aclose()

    seen, built = run(look())
    assert seen[0] == "/app\na\nmade\nx\nhello" and "test.sh" not in seen[1] and "x\ny" in seen[1]
    assert built.workdir == "/app" and "srv" in built.paths.roots
    assert (
        run(oracle(folder, config)) == (1.0, "success")
        and run(play(folder, config=config))[0] == 0.0
    )
    assert (
        run(
            play(
                folder,
                "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; (while :; do echo 1 >"
                " /logs/verifier/reward.txt; done) &",
                config=config,
            )
        )[0]
        == 0.0
    )
    assert run(build_image(load_task(folder), config)) == run(
        build_image(load_task(folder), config)
    )


@pytest.mark.slow
@pytest.mark.docker
def test_the_engine_copies_links_as_the_embedded_build_does(harbor, run, engine):
    config = SandboxConfig(backend="docker", image=engine.image, isolation="best_available")
    programs = ("mktemp", "base64")  # which grading needs
    files = {
        f"environment/{name}": pathlib.Path(f"/usr/bin/{name}").read_bytes() for name in programs
    }
    # The lists of apt are the system's: parts of them nobody else may read.
    lines = (
        "COPY mktemp base64 /usr/bin/\nRUN chmod 755 /usr/bin/mktemp /usr/bin/base64 && mkdir -p"
        " /var/lib/apt/lists && mkdir -m 700 /var/lib/apt/lists/partial\n"
    )
    folder = with_links(harbor, engine.image, files, lines)
    assert run(play(folder, "true", config=config))[0] == 1.0


@pytest.mark.slow
@pytest.mark.docker
def test_allowed_hosts_are_all_that_a_container_reaches(harbor, run, engine, files_server):
    config = SandboxConfig(backend="docker", image=engine.image, isolation="best_available")
    folder = harbor(
        {
            "task.toml": (
                'version = "1.0"\n[environment]\nnetwork_mode = "allowlist"\nallowed_hosts ='
                f' ["files@127.0.0.1:{files_server}"]\n'
            ),
            "environment/Dockerfile": None,
        }
    )

    async def episode():
        env = HarborEnv(folder, config)
        try:
            await env.areset()
            # By bash itself. A refused connection fails at once.
            ask = f"cat < /dev/tcp/{{}}/{files_server}"
            seen = [(await env.astep(bash(ask.format(host))))[0] for host in ("files", "192.0.2.1")]
            return seen, [denial.destination for denial in await env._sandbox.denials()]
        finally:
            await env.aclose()

    (allowed, other), denied = run(episode())
    assert allowed == "from outside" and "from outside" not in other and denied == ["192.0.2.1"]


@pytest.mark.slow
@pytest.mark.docker
def test_a_base_image_that_cannot_be_pulled_is_what_the_hub_has_under_its_name(
    harbor, run, engine, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = SandboxConfig(backend="docker", image=engine.image, isolation="best_available")
    built = harbor(
        {
            "environment/Dockerfile": (
                "# syntax\nfrom registry.invalid/python:3.13-slim as base\nWORKDIR /app\nRUN echo"
                " made > made\n"
            )
        }
    )
    plain = load_task(
        harbor(
            {
                "environment/Dockerfile": None,
                "task.toml": '[environment]\ndocker_image = "registry.invalid/python:3.13-slim"\n',
            },
            name="plain",
        )
    )
    with pytest.raises(BuildError):
        run(build_image(load_task(built), config))
    with local.open_hub() as hub:
        hub.register(
            "registry.invalid/python:3.13-slim",
            "image",
            f"sha256:{'0' * 64}",
            "default",
            reference=engine.image,
        )
    assert run(build_image(plain, config)) == engine.image
    assert (
        run(
            play(
                built,
                "read -r made < made; [ $made = made ] && echo x > /app/out.txt",
                config=config,
            )
        )[1]["tool_success_counter"]
        == 1
    )


@pytest.mark.slow
@pytest.mark.docker
def test_a_dockerfile_that_fails_is_a_build_error_with_the_engines_words(harbor, run, engine):
    config = SandboxConfig(backend="docker", image=engine.image, isolation="best_available")
    folder = harbor(
        {
            "environment/Dockerfile": (
                f"FROM {engine.image}\n# a remark\nENV A=1 \\\n  B=2\nRUN echo this is why >&2;"
                " exit 3\n"
            )
        }
    )
    with pytest.raises(BuildError, match=r"exit 3|returned a non-zero code: 3") as caught:
        run(HarborEnv(folder, config).areset())
    assert caught.value.line == 5
    assert (
        asyncio.run(
            build_image(
                load_task(
                    harbor(
                        {
                            "environment/Dockerfile": None,
                            "task.toml": (
                                'version = "1.0"\n[environment]\ndocker_image = "some:1"\n'
                            ),
                        },
                        name="other",
                    )
                ),
                config,
            )
        )
        == "some:1"
    )
