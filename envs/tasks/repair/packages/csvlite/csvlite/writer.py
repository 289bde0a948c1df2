"""Rows to text."""


def needs_quotes(field, delimiter):
    if field == "":
        return False
    if field[0] == " " or field[-1] == " ":
        return True
    return any(letter in field for letter in (delimiter, '"', "\n", "\r"))


def render(rows, delimiter=",", newline="\n"):
    """The text of rows; a row of one empty field is quoted, for an empty line would be no row."""
    lines = []
    for row in rows:
        fields = []
        for value in row:
            field = "" if value is None else str(value)
            if needs_quotes(field, delimiter) or (field == "" and len(row) == 1):
                field = '"' + field.replace('"', '""') + '"'
            fields.append(field)
        lines.append(delimiter.join(fields) + newline)
    return "".join(lines)
