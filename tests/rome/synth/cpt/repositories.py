"""Small git repositories, made by commands, for tests of corpora."""

import os
import pathlib
import subprocess

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.com",
    "GIT_COMMITTER_DATE": "2024-01-01T00:00:00Z",
}
MIT = "MIT\n\nPermission is hereby granted, free of charge, to any person\n"

WORDS = '''"""Words of a text."""


def split_words(text):
    """Return the words."""
    words = text.split()
    return words


def count_words(text):
    """Return how many words there are."""
    words = split_words(text)
    return len(words)
'''
TABLE = '''"""A table of counts."""

from words import split_words


class Table:
    def __init__(self):
        self.counts = {}

    def add(self, text):
        for word in split_words(text):
            self.counts[word] = self.counts.get(word, 0) + 1

    def most(self):
        """Return the most frequent word."""
        best = max(self.counts, key=lambda word: self.counts[word])
        return best
'''
TESTS = """import unittest

from table import Table
from words import count_words, split_words


class Words(unittest.TestCase):
    def test_split(self):
        self.assertEqual(split_words("a b"), ["a", "b"])

    def test_count(self):
        self.assertEqual(count_words("a b c"), 3)


def test_most():
    table = Table()
    table.add("x y y")
    assert table.most() == "y"
"""


def git(folder, *arguments):
    """Run git in a repository."""
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return done.stdout.decode()


def commit(folder, message, **files):
    """Write files (bytes, text, or None for none) and commit; return the commit."""
    for name, content in files.items():
        path = pathlib.Path(folder, name.replace("__", "/").replace("_py", ".py"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", message)
    return git(folder, "rev-parse", "HEAD").strip()


def make_repository(folder, licence=MIT):
    """Make a repository of two modules whose last commits mend a bug together with its test."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "--initial-branch=main")
    broken = TABLE.replace("max(self.counts", "min(self.counts")
    early = TESTS.split("\n\ndef test_most")[0] + "\n"
    commit(
        folder, "Add words and a table of them", LICENSE=licence, words_py=WORDS, table_py=broken
    )
    commit(folder, "Add tests of the words module", test_all_py=early)
    commit(folder, "Return the most frequent word of a table, not the rarest", table_py=TABLE,
           test_all_py=TESTS)  # fmt: skip
    commit(
        folder,
        "Explain the words module in its head",
        words_py=WORDS.replace("of a text", "in a text"),
    )
    return folder
