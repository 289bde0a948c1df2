"""One paragraph at a time."""


def split_long(word, width):
    """Pieces of a word, none longer than the width; all but the last end with a hyphen where there is room for one."""
    if width < 2:
        return list(word)
    pieces = []
    while len(word) > width:
        pieces.append(word[:width - 1] + "-")
        word = word[width - 1:]
    pieces.append(word)
    return pieces


def wrap(text, width, indent="", first=None):
    """The lines of a text. Empty lines separate paragraphs and stay; `first` is the indent of a paragraph's first line."""
    if width <= max(len(indent), len(first or "")):
        raise ValueError("width %d leaves no room beside the indent" % width)
    lines = []
    for paragraph in text.split("\n\n"):
        if lines:
            lines.append("")
        start = indent if first is None else first
        line, size = [], len(start)
        for word in paragraph.split():
            for piece in split_long(word, width - len(indent)):
                needed = len(piece) + (1 if line else 0)
                if line and size + needed > width:
                    lines.append(start + " ".join(line))
                    start, line = indent, []
                    size, needed = len(indent), len(piece)
                line.append(piece)
                size += needed
        if line:
            lines.append(start + " ".join(line))
    return lines


def shorten(text, width, dots="..."):
    """The first words that fit, and dots where there were more."""
    words = text.split()
    whole = " ".join(words)
    if len(whole) <= width:
        return whole
    if width < len(dots):
        raise ValueError("width %d is less than the dots" % width)
    while words and len(" ".join(words)) + 1 + len(dots) > width:
        words.pop()
    return (" ".join(words) + " " + dots) if words else dots


def align(line, width, how="left"):
    """A line filled to the width; "both" spreads the words, the wider gaps first."""
    room = width - len(line)
    if room <= 0:
        return line
    if how == "left":
        return line + " " * room
    if how == "right":
        return " " * room + line
    if how == "centre":
        return " " * (room // 2) + line + " " * (room - room // 2)
    if how == "both":
        words = line.split()
        if len(words) < 2:
            return line + " " * room
        spaces = width - sum(len(word) for word in words)
        least, more = divmod(spaces, len(words) - 1)
        parts = []
        for number, word in enumerate(words[:-1]):
            parts.append(word + " " * (least + (1 if number < more else 0)))
        return "".join(parts) + words[-1]
    raise ValueError("unknown alignment %r" % how)
