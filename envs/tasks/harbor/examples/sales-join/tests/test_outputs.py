import json
import unittest


class Totals(unittest.TestCase):
    def test_totals(self):
        with open("/app/totals.json") as file:
            self.assertEqual(json.load(file), {"NO": {"orders": 2, "cents": 1000}, "SE": {"orders": 2, "cents": 320},
                                               "unknown": {"orders": 2, "cents": 80}})


if __name__ == "__main__":
    unittest.main()
