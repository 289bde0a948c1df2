#!/bin/bash
cat > /app/rpn.py <<'END'
import operator
import sys

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def main(words):
    stack = []
    for word in words:
        if word in OPERATORS:
            right, left = stack.pop(), stack.pop()
            stack.append(OPERATORS[word](left, right))
        elif word == "dup":
            stack.append(stack[-1])
        else:
            stack.append(int(word))
    (result,) = stack
    print(result)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (IndexError, ValueError, ZeroDivisionError):
        sys.exit(1)
END
