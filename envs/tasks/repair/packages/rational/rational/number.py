"""A rational number: two integers in lowest terms, the denominator above 0."""


def gcd(a, b):
    """The greatest common divisor, never negative."""
    while b:
        a, b = b, a % b
    return abs(a)


class Rational:
    def __init__(self, numerator, denominator=1):
        if denominator == 0:
            raise ZeroDivisionError("a rational number with denominator 0")
        sign = -1 if denominator < 0 else 1
        divisor = gcd(numerator, denominator)
        self.numerator = sign * numerator // divisor
        self.denominator = abs(denominator) // divisor

    @classmethod
    def parse(cls, text):
        """From "3", "-3/4", "2.50" or "1 1/2"."""
        words = text.split()
        if len(words) == 2:
            whole, part = cls.parse(words[0]), cls.parse(words[1])
            if whole.denominator != 1 or part < 0 or part >= 1:
                raise ValueError("%r is no mixed number" % text)
            return whole - part if words[0].startswith("-") else whole + part
        if len(words) != 1:
            raise ValueError("%r is no rational number" % text)
        if "/" in text:
            above, below = words[0].split("/")
            return cls(int(above), int(below))
        if "." in text:
            before, after = words[0].split(".")
            return cls(int(before + after), 10 ** len(after))
        return cls(int(words[0]))

    @classmethod
    def approximate(cls, value, limit):
        """The nearest one, as Stern and Brocot find it, whose denominator is at most `limit`; `value` is a Rational."""
        whole = value.floor()
        low, high = (whole, 1), (whole + 1, 1)
        while True:
            middle = (low[0] + high[0], low[1] + high[1])
            if middle[1] > limit:
                break
            if cls(*middle) <= value:
                low = middle
            else:
                high = middle
            if cls(*low) == value:
                return value
        below, above = cls(*low), cls(*high)
        return below if value - below <= above - value else above

    def floor(self):
        return self.numerator // self.denominator

    def ceil(self):
        return -(-self.numerator // self.denominator)

    def round(self):
        """To the nearest integer; halves go to the even one."""
        below = self.floor()
        twice = (self - below) * 2
        if twice == 1:
            return below if below % 2 == 0 else below + 1
        return below + 1 if twice > 1 else below

    def decimal(self, places):
        """As text with so many places, cut off and not rounded."""
        sign = "-" if self < 0 else ""
        digits = abs(self.numerator) * 10 ** places // self.denominator
        text = str(digits).rjust(places + 1, "0")
        if places == 0:
            return sign + text
        return sign + text[:-places] + "." + text[-places:]

    def continued(self):
        """The terms of its continued fraction."""
        terms, above, below = [], self.numerator, self.denominator
        while below:
            terms.append(above // below)
            above, below = below, above % below
        return terms

    def __add__(self, other):
        other = _rational(other)
        return Rational(self.numerator * other.denominator + other.numerator * self.denominator, self.denominator * other.denominator)

    def __sub__(self, other):
        return self + -_rational(other)

    def __mul__(self, other):
        other = _rational(other)
        return Rational(self.numerator * other.numerator, self.denominator * other.denominator)

    def __truediv__(self, other):
        other = _rational(other)
        return Rational(self.numerator * other.denominator, self.denominator * other.numerator)

    def __pow__(self, exponent):
        if exponent < 0:
            return Rational(self.denominator, self.numerator) ** -exponent
        return Rational(self.numerator ** exponent, self.denominator ** exponent)

    def __neg__(self):
        return Rational(-self.numerator, self.denominator)

    def __abs__(self):
        return -self if self < 0 else self

    def __eq__(self, other):
        if not isinstance(other, (int, Rational)):
            return NotImplemented
        other = _rational(other)
        return self.numerator == other.numerator and self.denominator == other.denominator

    def __lt__(self, other):
        other = _rational(other)
        return self.numerator * other.denominator < other.numerator * self.denominator

    def __le__(self, other):
        return self < other or self == other

    def __gt__(self, other):
        return not self <= other

    def __ge__(self, other):
        return not self < other

    def __hash__(self):
        return hash(self.numerator) if self.denominator == 1 else hash((self.numerator, self.denominator))

    def __str__(self):
        return str(self.numerator) if self.denominator == 1 else "%d/%d" % (self.numerator, self.denominator)


def _rational(value):
    if isinstance(value, Rational):
        return value
    if isinstance(value, int):
        return Rational(value)
    raise TypeError("%r is neither a Rational nor an integer" % (value,))
