"""What a tree is worth."""

from .parser import parse

FUNCTIONS = {"min": min, "max": max, "abs": abs, "round": round}


def evaluate(text, names=None):
    """The value of an expression. Assignments are kept in `names`."""
    return value_of(parse(text), {} if names is None else names)


def value_of(tree, names):
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "name":
        if tree[1] not in names:
            raise NameError("%s has no value" % tree[1])
        return names[tree[1]]
    if kind == "set":
        names[tree[1]] = value_of(tree[2], names)
        return names[tree[1]]
    if kind == "negate":
        return -value_of(tree[1], names)
    if kind == "choose":
        return value_of(tree[2] if value_of(tree[1], names) else tree[3], names)
    if kind == "call":
        if tree[1] not in FUNCTIONS:
            raise NameError("there is no function %s" % tree[1])
        return FUNCTIONS[tree[1]](*[value_of(argument, names) for argument in tree[2]])
    return _operate(kind, value_of(tree[1], names), value_of(tree[2], names))


def _operate(operator, left, right):
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if operator == "/":
        quotient = left / right
        return int(quotient) if isinstance(left, int) and isinstance(right, int) and left % right == 0 else quotient
    if operator == "%":
        return left % right
    if operator == "**":
        return left ** right
    if operator == "<":
        return int(left < right)
    if operator == "<=":
        return int(left <= right)
    if operator == ">":
        return int(left > right)
    if operator == ">=":
        return int(left >= right)
    return int(left == right if operator == "==" else left != right)
