"""Counts again, from a copy of the letters: the agent may have changed its own."""
import collections
import pathlib
import re
import unittest

LETTERS = "The red fox saw the hen.\nThe hen, however, saw the fox first!\nA fox-red sky: red at night.\nHen's delight?\n"


class Report(unittest.TestCase):
    def test_report(self):
        counts = collections.Counter(re.findall("[a-z]+", LETTERS.lower()))
        wanted = [f"{word} {count}" for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
        self.assertEqual(pathlib.Path("/app/report.txt").read_text().split("\n"), [*wanted, ""])


if __name__ == "__main__":
    unittest.main()
