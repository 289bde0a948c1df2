import unittest

from calculator import SyntaxFault, evaluate, parse, tokenize


class Tokens(unittest.TestCase):
    def test_kinds_and_places(self):
        self.assertEqual(tokenize("a1 + 22"), [("name", "a1", 0), ("symbol", "+", 3), ("number", 22, 5), ("end", None, 7)])

    def test_numbers(self):
        for text, value in (("0", 0), ("1_000", 1000), ("2.5", 2.5), (".5", 0.5), ("3.", 3.0), ("1e3", 1000.0), ("25e-1", 2.5), ("1.5e2", 150.0)):
            token = tokenize(text)
            self.assertEqual((token[0], type(token[0][1]), len(token)), (("number", value, 0), type(value), 2), text)

    def test_where_numbers_end(self):
        self.assertEqual([token[1] for token in tokenize("1e 2_ 3.4.5 6ex")][:-1], [1, "e", 2, "_", 3.4, 0.5, 6, "ex"])
        self.assertEqual([token[1] for token in tokenize("1e2+3e-4*5")][:-1], [100.0, "+", 0.0003, "*", 5])
        self.assertEqual([token[1] for token in tokenize("1e-x")][:-1], [1, "e", "-", "x"])

    def test_the_longest_symbol_wins(self):
        self.assertEqual([token[1] for token in tokenize("a**b*c<=d<e==f=g!=h>=i>j")][1:-1:2], ["**", "*", "<=", "<", "==", "=", "!=", ">=", ">"])

    def test_comments(self):
        self.assertEqual([token[1] for token in tokenize("1 # one\n+ 2 # two")], [1, "+", 2, None])

    def test_names(self):
        self.assertEqual([token[1] for token in tokenize("_a b_2")], ["_a", "b_2", None])

    def test_what_is_no_token(self):
        for text, place in (("1 $ 2", 2), ("!", 0), (". 5", 0)):
            with self.assertRaises(SyntaxFault) as caught:
                tokenize(text)
            self.assertEqual(caught.exception.place, place)
            self.assertIn("at %d:" % place, str(caught.exception))


class Parsing(unittest.TestCase):
    def test_precedence(self):
        one, two, three = ("number", 1), ("number", 2), ("number", 3)
        self.assertEqual(parse("1+2*3"), ("+", one, ("*", two, three)))
        self.assertEqual(parse("1*2+3"), ("+", ("*", one, two), three))
        self.assertEqual(parse("1-2-3"), ("-", ("-", one, two), three))
        self.assertEqual(parse("1**2**3"), ("**", one, ("**", two, three)))
        self.assertEqual(parse("1<2+3"), ("<", one, ("+", two, three)))
        self.assertEqual(parse("-1**2"), ("negate", ("**", one, two)))
        self.assertEqual(parse("-1*2"), ("*", ("negate", one), two))
        self.assertEqual(parse("+1*2"), ("*", one, two))

    def test_calls(self):
        self.assertEqual(parse("f()"), ("call", "f", []))
        self.assertEqual(parse("f(1, 2)"), ("call", "f", [("number", 1), ("number", 2)]))

    def test_faults(self):
        for text, place in (("", 0), ("1 +", 3), ("(1", 2), ("1 2", 2), ("f(1 2)", 4), ("f(1,)", 4), ("1 ? 2", 5), (")", 0), ("1 = 2", 2), ("f(", 2)):
            with self.assertRaises(SyntaxFault, msg=text) as caught:
                parse(text)
            self.assertEqual(caught.exception.place, place, text)


class Values(unittest.TestCase):
    def test_arithmetic(self):
        for text, value in (("2+3", 5), ("2-3", -1), ("2*3", 6), ("7%4", 3), ("2**3", 8), ("6/3", 2), ("7/2", 3.5), ("6.0/3", 2.0), ("-(1+2)", -3), ("+4", 4), ("2--3", 5), ("6/4.0", 1.5)):
            self.assertEqual((evaluate(text), type(evaluate(text))), (value, type(value)), text)

    def test_comparison(self):
        for text, value in (("1<2", 1), ("2<2", 0), ("2<=2", 1), ("3<=2", 0), ("2>1", 1), ("2>2", 0), ("2>=2", 1), ("1>=2", 0), ("2==2", 1), ("1==2", 0), ("1!=2", 1), ("2!=2", 0)):
            self.assertEqual((evaluate(text), type(evaluate(text))), (value, int), text)

    def test_choice(self):
        self.assertEqual([evaluate(text) for text in ("1 ? 2 : 3", "0 ? 2 : 3", "0 ? 1 : 0 ? 2 : 3", "1 ? 0 ? 4 : 5 : 6", "(1 ? 2 : 3) + 1")], [2, 3, 3, 5, 3])
        self.assertEqual(evaluate("1 ? 2 : nothing"), 2)

    def test_names(self):
        names = {"x": 2}
        self.assertEqual((evaluate("y = x * 3", names), names), (6, {"x": 2, "y": 6}))
        with self.assertRaisesRegex(NameError, "z"):
            evaluate("z", names)
        with self.assertRaises(NameError):
            evaluate("x")

    def test_functions(self):
        self.assertEqual((evaluate("max(1, min(5, 3), 2)"), evaluate("abs(-2) + round(2.6)")), (3, 5))
        with self.assertRaisesRegex(NameError, "sin"):
            evaluate("sin(1)")

    def test_division_by_zero(self):
        with self.assertRaises(ZeroDivisionError):
            evaluate("1/0")
