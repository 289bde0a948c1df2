"""Who holds which prefix."""

from rome.serve.slots import SlotTable, chunk_keys


def test_keys_stand_for_the_whole_prefix_and_whole_chunks_only():
    a, b = chunk_keys([1, 2, 3, 4, 5], 2, "root"), chunk_keys([9, 2, 3, 4], 2, "root")
    assert len(a) == 2 and a[1] != b[1]
    assert a == chunk_keys([1, 2, 3, 4, 8], 2, "root")
    assert a != chunk_keys([1, 2, 3, 4, 5], 2, "other weights")


def test_a_request_gets_the_free_slot_that_holds_its_prefix():
    table = SlotTable(3)
    table.hold(1, [b"a", b"b"], [None, None])
    assert table.acquire([b"a", b"b", b"c"]) == 1


def test_a_short_match_does_not_displace_a_longer_prefix():
    table = SlotTable(2)
    table.hold(0, [b"a", b"b"], [None, None])
    taken = table.acquire([])
    table.release(taken)  # now slot 0's neighbour is the most recently used
    table.hold(1, [b"a"], [None])
    assert table.acquire([b"a", b"x"]) == 1


def test_without_a_match_the_least_recently_used_slot_goes_first():
    table = SlotTable(3)
    order = [table.acquire([]) for _ in range(3)]
    for slot in (order[1], order[2], order[0]):
        table.release(slot)
    assert table.acquire([]) == order[1]


def test_a_prefix_is_found_until_its_last_holder_drops_it():
    table = SlotTable(2)
    table.hold(0, [b"a"], ["routes"])
    table.hold(1, [b"a"], ["routes"])
    table.hold(0, [], [])
    assert table.find(b"a") == 1 and table.notes(1, 1) == ["routes"]
    table.forget_all()
    assert table.find(b"a") is None
