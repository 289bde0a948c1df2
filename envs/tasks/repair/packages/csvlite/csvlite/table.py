"""Rows with a header."""

from .reader import CsvError, parse
from .writer import render


class Table:
    """Columns by name. Short rows are filled with empty fields, long ones are refused."""

    def __init__(self, names, rows=()):
        if len(set(names)) != len(names):
            raise ValueError("two columns have one name")
        self.names = list(names)
        self.rows = []
        for row in rows:
            self.add(row)

    @classmethod
    def parse(cls, text, delimiter=","):
        rows = parse(text, delimiter)
        if not rows:
            raise CsvError(1, "there is no header")
        return cls(rows[0], rows[1:])

    def add(self, row):
        if len(row) > len(self.names):
            raise ValueError("a row has %d fields for %d columns" % (len(row), len(self.names)))
        self.rows.append(list(row) + [""] * (len(self.names) - len(row)))

    def column(self, name):
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def where(self, name, value):
        place = self.names.index(name)
        return Table(self.names, [row for row in self.rows if row[place] == value])

    def sort(self, name, key=str, descending=False):
        place = self.names.index(name)
        self.rows.sort(key=lambda row: key(row[place]), reverse=descending)
        return self

    def total(self, name):
        """The sum of a column; empty fields count 0."""
        result = 0.0
        for value in self.column(name):
            if value.strip():
                result += float(value)
        return result

    def render(self, delimiter=","):
        return render([self.names] + self.rows, delimiter)
