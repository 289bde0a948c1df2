"""What the scripts of a task install, read from their text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.tasks.harbor.installs import needs_of


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
