import unittest

from durations import seconds


class Test(unittest.TestCase):
    def test_good(self):
        self.assertEqual(seconds("1h 30m"), 5400)
        self.assertEqual(seconds("45s"), 45)
        self.assertEqual(seconds("12h"), 43200)

    def test_bad(self):
        for text in ("", "abc", "5"):
            with self.assertRaises(ValueError):
                seconds(text)
