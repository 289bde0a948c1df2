"""Text to rows."""


class CsvError(ValueError):
    """The text is no CSV. `line` counts from 1."""

    def __init__(self, line, message):
        super().__init__("line %d: %s" % (line, message))
        self.line = line


def parse(text, delimiter=","):
    """All rows of a text. A row is a list of fields; empty lines are no rows."""
    rows, row, field = [], [], []
    quoted = was_quoted = False
    line = opened = 1
    index = 0
    while index < len(text):
        letter = text[index]
        following = text[index + 1] if index + 1 < len(text) else ""
        if quoted:
            if letter == '"' and following == '"':
                field.append('"')
                index += 1
            elif letter == '"':
                quoted = False
            else:
                if letter == "\n":
                    line += 1
                field.append(letter)
        elif letter == '"':
            if field or was_quoted:
                raise CsvError(line, "a quote inside a field")
            quoted = was_quoted = True
            opened = line
        elif letter == delimiter:
            row.append("".join(field))
            field, was_quoted = [], False
        elif letter == "\n" or (letter == "\r" and following == "\n"):
            if letter == "\r":
                index += 1
            if row or field or was_quoted:
                row.append("".join(field))
                rows.append(row)
            row, field, was_quoted = [], [], False
            line += 1
        else:
            if was_quoted:
                raise CsvError(line, "text after a closing quote")
            field.append(letter)
        index += 1
    if quoted:
        raise CsvError(opened, "a quote is never closed")
    if row or field or was_quoted:
        row.append("".join(field))
        rows.append(row)
    return rows
