import unittest

from intervals import IntervalSet, IntervalTree


class Sets(unittest.TestCase):
    def test_touching_intervals_become_one(self):
        self.assertEqual(list(IntervalSet([(1, 3), (3, 5)])), [(1, 5)])
        self.assertEqual(list(IntervalSet([(3, 5), (1, 3)])), [(1, 5)])
        self.assertEqual(list(IntervalSet([(1, 2), (4, 5), (2, 4)])), [(1, 5)])

    def test_separate_ones_stay_and_are_sorted(self):
        self.assertEqual(list(IntervalSet([(7, 9), (1, 2), (4, 5)])), [(1, 2), (4, 5), (7, 9)])

    def test_one_inside_another(self):
        self.assertEqual(list(IntervalSet([(1, 9), (3, 4)])), [(1, 9)])
        self.assertEqual(list(IntervalSet([(3, 4), (1, 9)])), [(1, 9)])

    def test_empty_and_backward(self):
        self.assertEqual(list(IntervalSet([(3, 3)])), [])
        with self.assertRaises(ValueError):
            IntervalSet([(4, 3)])

    def test_length(self):
        self.assertEqual(len(IntervalSet([(1, 3), (10, 15)])), 7)

    def test_membership(self):
        some = IntervalSet([(1, 3), (5, 6)])
        self.assertEqual([value for value in range(-1, 8) if value in some], [1, 2, 5])

    def test_remove(self):
        for start, end, left in ((2, 4, [(1, 2), (4, 9)]), (0, 2, [(2, 9)]), (5, 12, [(1, 5)]), (0, 10, []), (9, 12, [(1, 9)]), (0, 1, [(1, 9)]), (1, 9, [])):
            some = IntervalSet([(1, 9)])
            some.remove(start, end)
            self.assertEqual(list(some), left, (start, end))

    def test_remove_over_several(self):
        some = IntervalSet([(1, 3), (5, 7), (9, 11)])
        some.remove(2, 10)
        self.assertEqual(list(some), [(1, 2), (10, 11)])

    def test_union_and_intersection(self):
        one, two = IntervalSet([(0, 5), (8, 12)]), IntervalSet([(3, 9), (11, 20)])
        self.assertEqual(list(one.union(two)), [(0, 20)])
        self.assertEqual(list(one.intersection(two)), [(3, 5), (8, 9), (11, 12)])
        self.assertEqual(list(two.intersection(one)), [(3, 5), (8, 9), (11, 12)])
        self.assertEqual(list(one.intersection(IntervalSet([(5, 8)]))), [])
        self.assertEqual(list(one), [(0, 5), (8, 12)])

    def test_equality(self):
        self.assertEqual(IntervalSet([(1, 2), (2, 3)]), IntervalSet([(1, 3)]))
        self.assertNotEqual(IntervalSet([(1, 2)]), IntervalSet([(1, 3)]))
        self.assertNotEqual(IntervalSet(), [])

    def test_gaps(self):
        self.assertEqual(IntervalSet([(1, 2), (4, 5), (9, 10)]).gaps(), [(2, 4), (5, 9)])
        self.assertEqual(IntervalSet([(1, 2)]).gaps(), [])

    def test_first_free(self):
        some = IntervalSet([(2, 4), (5, 9)])
        self.assertEqual([some.first_free(size) for size in (1, 2, 3)], [0, 0, 9])
        self.assertEqual(some.first_free(1, 2), 4)
        self.assertEqual(some.first_free(1, 3), 4)
        self.assertEqual(some.first_free(2, 3), 9)
        self.assertEqual(some.first_free(1, 20), 20)
        self.assertEqual(IntervalSet().first_free(5), 0)


class Trees(unittest.TestCase):
    ENTRIES = [(0, 10, "a"), (2, 4, "b"), (3, 12, "c"), (9, 11, "d"), (15, 20, "e"), (15, 16, "f"), (19, 30, "g"), (-5, 0, "h")]

    def setUp(self):
        self.tree = IntervalTree(self.ENTRIES)

    def test_every_point_is_as_a_look_at_all_of_them_says(self):
        for point in range(-7, 33):
            wanted = [value for start, end, value in sorted(self.ENTRIES) if start <= point < end]
            self.assertEqual(self.tree.at(point), wanted, point)

    def test_every_overlap_is_too(self):
        for start in range(-7, 33):
            for end in range(start, 33, 3):
                wanted = [value for low, high, value in sorted(self.ENTRIES) if low < end and high > start and start < end]
                self.assertEqual(self.tree.overlapping(start, end), wanted, (start, end))

    def test_size_and_depth(self):
        self.assertEqual(len(self.tree), 8)
        self.assertEqual(IntervalTree([]).depth(), 0)
        self.assertEqual(IntervalTree([(1, 5, "x"), (2, 6, "y")]).depth(), 1)
        self.assertLessEqual(IntervalTree([(n, n + 1, n) for n in range(64)]).depth(), 8)

    def test_nothing_in_an_empty_tree(self):
        self.assertEqual((IntervalTree([]).at(1), IntervalTree([]).overlapping(0, 9), len(IntervalTree([]))), ([], [], 0))

    def test_empty_intervals_are_refused(self):
        for start, end in ((3, 3), (4, 3)):
            with self.assertRaises(ValueError):
                IntervalTree([(start, end, "x")])
        IntervalTree([(3, 4, "x")])

    def test_a_generator_will_do(self):
        self.assertEqual(IntervalTree(entry for entry in [(1, 3, "x")]).at(2), ["x"])
