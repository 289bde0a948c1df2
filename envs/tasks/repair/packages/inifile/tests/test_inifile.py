import unittest

from inifile import Document, IniError

TEXT = """\
# who and where
Name = Ada   # a comment
home = /srv/${name}
[paths]
data = ${:x}
log = ${root}/log
root = /var
list = a, b,
    c

    d = no continuation
[flags]
On = yes
off = OFF
bad = maybe
size = 1_024
ratio = 0.5
quoted = " a # b "
hash = a#b
"""


class Reading(unittest.TestCase):
    def setUp(self):
        self.document = Document.parse(TEXT)

    def test_sections_and_names(self):
        self.assertEqual(self.document.sections(), ["paths", "flags"])
        self.assertEqual(self.document.names(), ["name", "home"])
        self.assertEqual(self.document.names("paths"), ["data", "log", "root", "list", "d"])

    def test_values(self):
        self.assertEqual((self.document.get("NAME"), self.document.raw("home")), ("Ada", "/srv/${name}"))
        self.assertEqual(self.document.get("d", "paths"), "no continuation")

    def test_comments_and_quotes(self):
        self.assertEqual((self.document.get("quoted", "flags"), self.document.get("hash", "flags")), (" a # b ", "a#b"))
        self.assertEqual(Document.parse('a = "x\nb = "\nc = ""\n; d\n').raw("a"), '"x')
        self.assertEqual(Document.parse('b = "\nc = ""\n').raw("b"), '"')
        self.assertEqual(Document.parse('c = ""\n;x = y\n').raw("c"), "")
        self.assertEqual(Document.parse('c = "a" "b" # c').raw("c"), 'a" "b')

    def test_continued_lines(self):
        self.assertEqual(self.document.raw("list", "paths"), "a, b,\nc")
        self.assertEqual(self.document.items("list", "paths"), ["a", "b", "c"])
        self.assertEqual(Document.parse("[s]\n  a = 1\n  # no\n  more\n").raw("a", "s"), "1\nmore")

    def test_references(self):
        self.assertEqual((self.document.get("home"), self.document.get("log", "paths")), ("/srv/Ada", "/var/log"))
        self.assertEqual(Document.parse("[a]\nx = ${b:y}!\n[b]\ny = ${z}\nz = 1").get("x", "a"), "1!")
        self.assertEqual(self.document.get("data", "paths"), "${:x}")

    def test_circles(self):
        with self.assertRaisesRegex(IniError, "circle"):
            Document.parse("a = ${b}\nb = ${a}").get("a")
        chain = "".join("a%d = ${a%d}\n" % (n, n + 1) for n in range(10)) + "a10 = x"
        self.assertEqual(Document.parse(chain).get("a0"), "x")
        with self.assertRaises(IniError):
            Document.parse("b = ${a0}\n" + chain).get("b")

    def test_types(self):
        number = self.document.number
        self.assertEqual((number("size", "flags"), number("ratio", "flags"), number("none", "flags", 7)), (1024, 0.5, 7))
        self.assertIsInstance(number("size", "flags"), int)
        flag = self.document.flag
        self.assertEqual([flag("on", "flags"), flag("off", "flags"), flag("none", "flags", "true"), flag("none", default="0")], [True, False, True, False])
        with self.assertRaisesRegex(IniError, "maybe"):
            flag("bad", "flags")

    def test_missing(self):
        with self.assertRaisesRegex(KeyError, "paths.none"):
            self.document.get("none", "paths")
        with self.assertRaisesRegex(KeyError, "section nowhere"):
            self.document.names("nowhere")
        self.assertEqual((self.document.get("none", default="x"), self.document.get("a", "nowhere", "y")), ("x", "y"))

    def test_faults_name_their_line(self):
        for text, line in (("a = 1\nb", 2), ("= 1", 1), ("[a", 1), ("[]", 1), ("[a]\n\n[a]", 3), ("a=1\nA=2", 2), ("\n[a]\nx=1\nX = 2", 4)):
            with self.assertRaises(IniError, msg=text) as caught:
                Document.parse(text)
            self.assertEqual(caught.exception.line, line, text)
            self.assertIn("line %d:" % line, str(caught.exception))

    def test_one_name_in_two_sections(self):
        self.assertEqual(Document.parse("[a]\nx=1\n[b]\nx=2").get("x", "b"), "2")

    def test_an_indented_first_line_continues_nothing(self):
        self.assertEqual(Document.parse("a = 1\n[s]\n  b = 2\n").get("b", "s"), "2")
        self.assertEqual(Document.parse("a = 1\n\n  b = 2\n").get("b"), "2")


class Writing(unittest.TestCase):
    def test_changes(self):
        document = Document.parse("a = 1\n[s]\nb = 2\nc = 3\n")
        document.set("A", 5)
        document.set("d", "x", "new")
        document.remove("B", "s")
        self.assertEqual(document.render(), "a = 5\n\n[s]\nc = 3\n\n[new]\nd = x\n")
        document.remove("c", "s")
        document.remove("a")
        self.assertEqual(document.render(), "[new]\nd = x\n")
        self.assertEqual(document.names(), [])
        with self.assertRaises(KeyError):
            document.remove("a")

    def test_merge(self):
        one, two = Document.parse("a = 1\nb = 1\n[s]\nx = 1"), Document.parse("b = 2\n[s]\ny = 2\n[t]\nz = 3")
        self.assertEqual(one.merge(two).render(), "a = 1\nb = 2\n\n[s]\nx = 1\ny = 2\n\n[t]\nz = 3\n")

    def test_what_is_written_is_read_again(self):
        document = Document()
        for name, value in (("plain", "x"), ("space", " x "), ("hash", "a # b"), ("lines", "1\n2\n3"), ("quoted", '"q"')):
            document.set(name, value, "s")
        self.assertEqual([(name, Document.parse(document.render()).raw(name, "s")) for name in document.names("s")],
                         [(name, document.raw(name, "s")) for name in document.names("s")])
