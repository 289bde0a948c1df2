import pathlib
import unittest


class Downloads(unittest.TestCase):
    def test_tree(self):
        root = pathlib.Path("/app/downloads")
        found = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file() and not path.is_symlink()}
        self.assertEqual(found, {"txt/a.txt": "same\n", "txt/B.TXT": "other\n", "md/b.md": "# b\n", "other/README": "read me\n",
                                 "csv/data.csv": "1,2\n", "csv/data2.csv": "1,3\n"})


if __name__ == "__main__":
    unittest.main()
