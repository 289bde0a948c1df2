import unittest

from textwrapper import align, columns, shorten, table, wrap
from textwrapper.wrap import split_long

TEXT = "the quick brown fox jumps over the lazy dog"


class Wrapping(unittest.TestCase):
    def test_lines_are_as_full_as_they_can_be(self):
        self.assertEqual(wrap(TEXT, 15), ["the quick brown", "fox jumps over", "the lazy dog"])
        self.assertEqual(wrap(TEXT, 14), ["the quick", "brown fox", "jumps over the", "lazy dog"])

    def test_one_line(self):
        self.assertEqual(wrap("  a   b\nc ", 80), ["a b c"])
        self.assertEqual(wrap("", 5), [])

    def test_indents(self):
        self.assertEqual(wrap("aa bb cc dd", 7, indent="  "), ["  aa bb", "  cc dd"])
        self.assertEqual(wrap("aa bb cc dd", 7, indent="  ", first="- "), ["- aa bb", "  cc dd"])
        self.assertEqual(wrap("aa bb cc", 5, first=""), ["aa bb", "cc"])
        self.assertEqual(wrap("aa bb cc dd", 6, indent=" ", first="   "), ["   aa", " bb cc", " dd"])

    def test_paragraphs(self):
        self.assertEqual(wrap("a b\n\nc", 3, first=""), ["a b", "", "c"])
        self.assertEqual(wrap("a a\n\nb b b", 4, indent=" ", first=""), ["a a", "", "b b", " b"])

    def test_long_words_are_split(self):
        self.assertEqual(wrap("abcdefgh ij", 4), ["abc-", "def-", "gh", "ij"])
        self.assertEqual(wrap("x abcdef", 5, indent=" "), [" x", " abc-", " def"])
        self.assertEqual(split_long("abcd", 4), ["abcd"])
        self.assertEqual(split_long("abc", 1), ["a", "b", "c"])
        self.assertEqual(split_long("abcd", 2), ["a-", "b-", "cd"])

    def test_no_room(self):
        for arguments in ((2, "  "), (3, "", "   ")):
            with self.assertRaises(ValueError):
                wrap("a", *arguments)
        self.assertEqual(wrap("a", 3, "  "), ["  a"])

    def test_no_line_is_too_long_and_no_word_is_lost(self):
        for width in range(5, 30):
            lines = wrap(TEXT, width)
            self.assertLessEqual(max(map(len, lines)), width)
            self.assertEqual(" ".join(lines).split(), TEXT.split())


class Shortening(unittest.TestCase):
    def test_what_fits_stays(self):
        self.assertEqual(shorten("a  b", 3), "a b")

    def test_words_are_left_out(self):
        self.assertEqual([shorten("one two three", width) for width in (13, 12, 11, 10, 7, 6, 3)], ["one two three", "one two ...", "one two ...", "one ...", "one ...", "...", "..."])
        self.assertEqual(shorten("one two", 5, ".."), "..")

    def test_too_narrow(self):
        with self.assertRaises(ValueError):
            shorten("one two", 2)


class Aligning(unittest.TestCase):
    def test_each_way(self):
        self.assertEqual([align("ab", 5, how) for how in ("left", "right", "centre", "both")], ["ab   ", "   ab", " ab  ", "ab   "])
        self.assertEqual(align("ab", 5), "ab   ")

    def test_both(self):
        self.assertEqual(align("a b c", 8, "both"), "a   b  c")
        self.assertEqual(align("a b c", 7, "both"), "a  b  c")
        self.assertEqual(align("aa b", 6, "both"), "aa   b")

    def test_a_line_that_is_too_long_stays(self):
        self.assertEqual([align("abc", 2, how) for how in ("left", "nonsense")], ["abc", "abc"])
        self.assertEqual(align("abc", 3, "right"), "abc")

    def test_unknown(self):
        with self.assertRaises(ValueError):
            align("a", 3, "up")


class Columns(unittest.TestCase):
    def test_down_the_columns_first(self):
        self.assertEqual(columns(["a", "b", "c", "d", "e"], 7), ["a  c  e", "b  d"])
        self.assertEqual(columns(["aa", "b", "c"], 6), ["aa  c", "b"])
        self.assertEqual(columns(["aa", "b", "c"], 5), ["aa", "b", "c"])
        self.assertEqual(columns(["aa", "b", "c"], 80), ["aa  b   c"])

    def test_narrow_and_empty(self):
        self.assertEqual(columns(["abc", "d"], 1), ["abc", "d"])
        self.assertEqual(columns([], 10), [])

    def test_gap(self):
        self.assertEqual(columns(["a", "b"], 6, gap=4), ["a    b"])
        self.assertEqual(columns(["a", "b"], 5, gap=4), ["a", "b"])

    def test_table(self):
        self.assertEqual(table([["a", 1], ["bcd", 22]], ["x", "n"], numbers=(1,)), ["x   |  n", "----+---", "a   |  1", "bcd | 22"])
        self.assertEqual(table([["a", "b"]]), ["a | b"])
        self.assertEqual(table([]), [])
        self.assertEqual(table([], ["ab", "c"]), ["ab | c", "---+--"])

    def test_uneven_rows(self):
        with self.assertRaisesRegex(ValueError, "row 1 has 1 cells instead of 2"):
            table([["a", "b"], ["c"]])
