"""Lists and tables in columns."""

from .wrap import align


def columns(items, width, gap=2):
    """Items in as few rows as fit in the width, down the columns first, as ls has them."""
    if not items:
        return []
    longest = max(len(item) for item in items)
    count = max(1, (width + gap) // (longest + gap))
    rows = -(-len(items) // count)
    lines = []
    for row in range(rows):
        cells = items[row::rows]
        line = (" " * gap).join(align(cell, longest) for cell in cells)
        lines.append(line.rstrip())
    return lines


def table(rows, header=None, numbers=()):
    """Rows in columns as wide as their widest cell. Columns whose index is in `numbers` are aligned to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    everything = ([list(header)] if header else []) + body
    if not everything:
        return []
    width = len(everything[0])
    for number, row in enumerate(everything):
        if len(row) != width:
            raise ValueError("row %d has %d cells instead of %d" % (number, len(row), width))
    sizes = [max(len(row[column]) for row in everything) for column in range(width)]
    lines = []
    for row in everything:
        cells = [align(cell, sizes[column], "right" if column in numbers else "left") for column, cell in enumerate(row)]
        lines.append(" | ".join(cells).rstrip())
    if header:
        lines.insert(1, "-+-".join("-" * size for size in sizes))
    return lines
