"""Tokens to a tree of tuples, by precedence climbing."""

from .tokens import SyntaxFault, tokenize

LEVELS = {"<": 1, "<=": 1, ">": 1, ">=": 1, "==": 1, "!=": 1, "+": 2, "-": 2, "*": 3, "/": 3, "%": 3, "**": 5}
RIGHT = ("**",)
UNARY_LEVEL = 4


class _Parser:
    def __init__(self, text):
        self.tokens = tokenize(text)
        self.index = 0

    @property
    def token(self):
        return self.tokens[self.index]

    def take(self, symbol):
        """Whether the next token is this symbol, which is then passed."""
        if self.token[:2] == ("symbol", symbol):
            self.index += 1
            return True
        return False

    def expect(self, symbol):
        if not self.take(symbol):
            raise SyntaxFault(self.token[2], "expected %r" % symbol)

    def statement(self):
        if self.token[0] == "name" and self.tokens[self.index + 1][:2] == ("symbol", "="):
            name = self.token[1]
            self.index += 2
            tree = ("set", name, self.choice())
        else:
            tree = self.choice()
        if self.token[0] != "end":
            raise SyntaxFault(self.token[2], "unexpected %r" % (self.token[1],))
        return tree

    def choice(self):
        condition = self.binary(1)
        if not self.take("?"):
            return condition
        yes = self.choice()
        self.expect(":")
        return ("choose", condition, yes, self.choice())

    def binary(self, level):
        left = self.unary()
        while self.token[0] == "symbol" and LEVELS.get(self.token[1], 0) >= level:
            operator = self.token[1]
            self.index += 1
            own = LEVELS[operator]
            left = (operator, left, self.binary(own if operator in RIGHT else own + 1))
        return left

    def unary(self):
        if self.take("-"):
            return ("negate", self.binary(UNARY_LEVEL))
        if self.take("+"):
            return self.binary(UNARY_LEVEL)
        return self.atom()

    def atom(self):
        kind, value, place = self.token
        self.index += 1
        if kind == "number":
            return ("number", value)
        if kind == "name":
            if self.take("("):
                return ("call", value, self.arguments())
            return ("name", value)
        if (kind, value) == ("symbol", "("):
            tree = self.choice()
            self.expect(")")
            return tree
        raise SyntaxFault(place, "expected a value")

    def arguments(self):
        found = []
        if self.take(")"):
            return found
        while True:
            found.append(self.choice())
            if self.take(")"):
                return found
            self.expect(",")


def parse(text):
    return _Parser(text).statement()
