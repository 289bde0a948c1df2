import pathlib
import sqlite3
import unittest


class Shop(unittest.TestCase):
    def test_stock(self):
        base = sqlite3.connect("file:/app/shop.db?mode=ro", uri=True)
        self.assertEqual(base.execute("select id, name, stock from products order by id").fetchall(),
                         [(1, "lamp", 7), (2, "cup", 4), (3, "rope", 2), (4, "bell", 12), (5, "hat", 4)])
        self.assertEqual(base.execute("select count(*), sum(amount) from moves").fetchall(), [(9, 29)])

    def test_names(self):
        self.assertEqual(pathlib.Path("/app/corrected.txt").read_text().split(), ["cup", "rope"])


if __name__ == "__main__":
    unittest.main()
