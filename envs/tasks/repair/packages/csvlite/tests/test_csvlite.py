import unittest

from csvlite import CsvError, Table, parse, render
from csvlite.writer import needs_quotes


class Reading(unittest.TestCase):
    def test_plain_rows(self):
        self.assertEqual(parse("a,b\n1,2\n"), [["a", "b"], ["1", "2"]])

    def test_last_line_without_a_newline(self):
        self.assertEqual(parse("a,b\n1,"), [["a", "b"], ["1", ""]])
        self.assertEqual(parse("x"), [["x"]])

    def test_windows_line_ends_and_a_lone_return(self):
        self.assertEqual(parse("a,b\r\nc\r\n"), [["a", "b"], ["c"]])
        self.assertEqual(parse("a\rb\n"), [["a\rb"]])

    def test_quotes(self):
        self.assertEqual(parse('"a,b","c ""d"""\n'), [["a,b", 'c "d"']])
        self.assertEqual(parse('"",x\n""\n'), [["", "x"], [""]])

    def test_a_newline_in_quotes(self):
        self.assertEqual(parse('"a\nb",c\n'), [["a\nb", "c"]])

    def test_empty_lines_are_no_rows(self):
        self.assertEqual(parse("\n\na\n\n"), [["a"]])
        self.assertEqual(parse(""), [])

    def test_another_delimiter(self):
        self.assertEqual(parse("a;b,c", ";"), [["a", "b,c"]])

    def test_errors_name_their_line(self):
        for text, line in (('a\nb"c', 2), ('"a"b', 1), ('a\n\n"b\nc', 3), ('"a\nb""" x', 2), ('"a" "b"', 1), ('"a""b"c', 1), ('x\n""""""y', 2)):
            with self.assertRaises(CsvError) as caught:
                parse(text)
            self.assertEqual(caught.exception.line, line, text)
            self.assertIn("line %d:" % line, str(caught.exception))

    def test_two_quoted_fields_that_touch(self):
        with self.assertRaises(CsvError):
            parse('a,"b" "c"')


class Writing(unittest.TestCase):
    def test_only_what_needs_quotes_has_them(self):
        self.assertEqual(render([["a", "b c", "d,e", 'f"g', "h\ni", " j", "k ", "l\rm"]]), 'a,b c,"d,e","f""g","h\ni"," j","k ","l\rm"\n')
        self.assertFalse(needs_quotes("", ","))
        self.assertFalse(needs_quotes("a,b", ";"))

    def test_values_that_are_no_text(self):
        self.assertEqual(render([[1, None, 2.5]]), "1,,2.5\n")

    def test_a_row_of_one_empty_field(self):
        self.assertEqual(render([[""], ["", ""]]), '""\n,\n')

    def test_line_ends_and_delimiters(self):
        self.assertEqual(render([["a", "b"], ["c"]], ";", "\r\n"), "a;b\r\nc\r\n")

    def test_what_is_written_is_read_again(self):
        rows = [["a", "", 'q"'], ["\n", ",", " "], [""], ["x"]]
        self.assertEqual(parse(render(rows)), rows)
        self.assertEqual(parse(render(rows, "\t"), "\t"), rows)


class Tables(unittest.TestCase):
    def setUp(self):
        self.table = Table.parse("name,price\npear,2.5\nfig,10\nplum\n")

    def test_short_rows_are_filled(self):
        self.assertEqual(self.table.rows, [["pear", "2.5"], ["fig", "10"], ["plum", ""]])

    def test_long_rows_are_refused(self):
        with self.assertRaisesRegex(ValueError, "3 fields for 2 columns"):
            self.table.add(["a", "b", "c"])
        self.table.add(["a", "b"])
        self.assertEqual(len(self.table.rows), 4)

    def test_columns(self):
        self.assertEqual(self.table.column("price"), ["2.5", "10", ""])
        with self.assertRaises(ValueError):
            self.table.column("size")

    def test_where(self):
        found = self.table.where("name", "fig")
        self.assertEqual((found.names, found.rows), (["name", "price"], [["fig", "10"]]))

    def test_total(self):
        self.assertEqual(self.table.total("price"), 12.5)
        self.assertEqual(Table(["a"], [[" "], ["3"]]).total("a"), 3.0)

    def test_sort(self):
        self.assertEqual(self.table.sort("name").column("name"), ["fig", "pear", "plum"])
        self.assertEqual(self.table.sort("name", descending=True).column("name"), ["plum", "pear", "fig"])
        self.assertEqual(self.table.sort("price", key=len).column("price"), ["", "10", "2.5"])

    def test_render(self):
        self.assertEqual(self.table.render(), "name,price\npear,2.5\nfig,10\nplum,\n")
        self.assertEqual(Table.parse("a;b", ";").render(";"), "a;b\n")

    def test_bad_headers(self):
        with self.assertRaises(ValueError):
            Table(["a", "a"])
        with self.assertRaises(CsvError):
            Table.parse("\n")
