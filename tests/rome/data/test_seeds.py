"""Seeds depend on their parts and on nothing else."""

from rome.data.seeds import derive_seed


def test_seeds_are_fixed_distinct_and_of_31_bits():
    assert derive_seed(0, "find/3", 1) == 23410633
    assert len({derive_seed(0, "eval", number) for number in range(1000)}) == 1000
    assert 0 <= derive_seed("x") < 2**31
