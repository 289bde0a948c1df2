import unittest

from rational import Rational, gcd


class Making(unittest.TestCase):
    def test_lowest_terms_and_the_sign_above(self):
        for above, below, text in ((2, 4, "1/2"), (-2, 4, "-1/2"), (2, -4, "-1/2"), (-2, -4, "1/2"), (6, 3, "2"), (0, -5, "0"), (7, 1, "7")):
            self.assertEqual(str(Rational(above, below)), text)

    def test_no_denominator_0(self):
        with self.assertRaises(ZeroDivisionError):
            Rational(1, 0)

    def test_gcd(self):
        self.assertEqual([gcd(*pair) for pair in ((12, 18), (18, 12), (7, 3), (0, 5), (5, 0), (-4, 6), (4, -6))], [6, 6, 1, 5, 5, 2, 2])

    def test_parse(self):
        for text, value in (("3", "3"), ("-3/4", "-3/4"), ("2.50", "5/2"), ("1 1/2", "3/2"), ("-1 1/4", "-5/4"), (" 7 ", "7"), ("0.125", "1/8"), ("-0.5", "-1/2"), ("4/6", "2/3")):
            self.assertEqual(str(Rational.parse(text)), value, text)

    def test_what_is_not_parsed(self):
        for text in ("", "a", "1 2 3", "1/2/3", "1/2 1/2", "1 3/2", "1 -1/2", "1.5 1/2", "1 1"):
            with self.assertRaises(ValueError, msg=text):
                Rational.parse(text)


class Arithmetic(unittest.TestCase):
    def test_the_four(self):
        a, b = Rational(1, 2), Rational(1, 3)
        self.assertEqual([str(value) for value in (a + b, a - b, b - a, a * b, a / b, b / a)], ["5/6", "1/6", "-1/6", "1/6", "3/2", "2/3"])
        self.assertEqual([str(value) for value in (a + 1, a - 2, a * 3, a / 2)], ["3/2", "-3/2", "3/2", "1/4"])

    def test_division_by_nothing(self):
        with self.assertRaises(ZeroDivisionError):
            Rational(1) / 0

    def test_powers(self):
        self.assertEqual([str(Rational(2, 3) ** n) for n in (0, 1, 2, -1, -2)], ["1", "2/3", "4/9", "3/2", "9/4"])
        self.assertEqual(str(Rational(-2, 3) ** -3), "-27/8")

    def test_signs(self):
        self.assertEqual((str(-Rational(1, 2)), str(abs(Rational(-1, 2))), str(abs(Rational(1, 2))), str(abs(Rational(0)))), ("-1/2", "1/2", "1/2", "0"))

    def test_order(self):
        values = [Rational(-1, 2), Rational(0), Rational(1, 3), Rational(1, 2), Rational(2)]
        self.assertEqual(sorted(reversed(values)), values)
        a, b = values[2:4]
        self.assertTrue(a < b and b > a and a <= b and b >= a and a <= a and a >= a)
        self.assertFalse(b < a or a > b or b <= a or a >= b or a < a or a > a)
        self.assertTrue(a < 1 and b > 0 and values[4] >= 2 and values[4] <= 2)

    def test_equality_and_hashes(self):
        self.assertEqual(Rational(4, 2), 2)
        self.assertNotEqual(Rational(1, 2), Rational(1, 3))
        self.assertNotEqual(Rational(1, 2), Rational(3, 2))
        self.assertNotEqual(Rational(1, 2), "1/2")
        self.assertEqual(len({Rational(1, 2), Rational(2, 4), Rational(2), 2, Rational(1, 3)}), 3)

    def test_other_types(self):
        with self.assertRaises(TypeError):
            Rational(1) + "1"


class Rounding(unittest.TestCase):
    def test_floor_and_ceil(self):
        self.assertEqual([Rational(n, 2).floor() for n in (-3, -2, 3, 4)], [-2, -1, 1, 2])
        self.assertEqual([Rational(n, 2).ceil() for n in (-3, -2, 3, 4)], [-1, -1, 2, 2])

    def test_round_halves_to_even(self):
        self.assertEqual([Rational(n, 2).round() for n in (1, 3, 5, 4, -1, -3)], [0, 2, 2, 2, 0, -2])
        self.assertEqual([Rational(n, 3).round() for n in (1, 2, 4, 5, -1, -2)], [0, 1, 1, 2, 0, -1])

    def test_decimal(self):
        self.assertEqual([Rational(1, 3).decimal(n) for n in (0, 1, 4)], ["0", "0.3", "0.3333"])
        self.assertEqual((Rational(-5, 4).decimal(1), Rational(25, 2).decimal(2), Rational(1, 200).decimal(2), Rational(100).decimal(0)), ("-1.2", "12.50", "0.00", "100"))

    def test_continued(self):
        self.assertEqual((Rational(415, 93).continued(), Rational(3).continued(), Rational(1, 2).continued()), ([4, 2, 6, 7], [3], [0, 2]))

    def test_approximate(self):
        pi = Rational(314159, 100000)
        self.assertEqual([str(Rational.approximate(pi, limit)) for limit in (1, 7, 10, 113, 120)], ["3", "22/7", "22/7", "355/113", "355/113"])
        self.assertEqual(str(Rational.approximate(Rational(2, 3), 3)), "2/3")
        self.assertEqual(str(Rational.approximate(Rational(9, 10), 2)), "1")
        self.assertEqual(str(Rational.approximate(Rational(1, 2), 1)), "0")
