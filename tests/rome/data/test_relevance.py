"""Rel(k): the heuristic against labelled turns, and what it must never do."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.labelled_turns import labelled_turns, make_trajectory, turn
from rome.data.batch import CONTEXT, IMITATION
from rome.data.lines import ExampleOptions, to_examples
from rome.data.relevance import ERRORS, MASKS, REASONS, irrelevant_turns, mask_turns, parse_masks
from rome.data.trajectory import Chunk
from rome.data.tree import LAST, ROOT

SEEDS = (1, 2, 3)  # 0 is what the heuristic was written on


def test_its_error_rate_on_200_labelled_turns_is_at_most_what_the_documentation_says():
    for seed in SEEDS:
        labelled = labelled_turns(200, seed)
        assert len(labelled) == 200
        missed, wrong = collections.Counter(), collections.Counter()
        for one in labelled:
            found = irrelevant_turns(one.trajectory).get(one.chunk, "")
            if bool(found) != bool(one.label):
                (missed if one.label else wrong)[one.kind] += 1
        assert missed.total() <= 10, (seed, missed)
        assert wrong.total() <= 2, (seed, wrong)


def test_a_listing_after_a_change_is_relevant_and_without_one_it_is_a_duplicate():
    listing = turn("ls -l", "total 1\nmeadow.txt")
    again = make_trajectory("Sort meadow.txt.", [listing, turn("head meadow.txt", "b"), listing])
    assert irrelevant_turns(again) == {2: "duplicates"}
    changed = make_trajectory("Sort meadow.txt.", [listing, turn("touch meadow.txt", ""), listing])
    assert irrelevant_turns(changed) == {}


def test_each_sort_of_irrelevant_turn_is_named():
    reasons = {one.label for one in labelled_turns(200, 1) if one.label}
    assert reasons == set(REASONS)


def test_a_turn_without_a_call_is_never_masked():
    answer = Chunk([1], [2], [0.0], text="The file is sorted.")
    assert irrelevant_turns(make_trajectory("Sort it.", [answer] * 5)) == {}


commands = st.sampled_from(
    ["ls", "cat a_b.txt", "make", "echo x > y", "sleep 1", "", "🙂", "fortune"]
)
answers = st.sampled_from(["", "0", "error 3", "a b c" * 10, "\x00"])


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(commands, answers, st.integers(LAST, 6), st.booleans()), max_size=12),
    instruction=st.text(max_size=40),
)
def test_any_record_gets_reasons_and_masking_loses_no_token(turns, instruction):
    chunks = []
    for number, (command, answer, parent, opens) in enumerate(turns):
        if opens:
            chunks.append(turn(command, answer, parent=ROOT, edge="compaction"))
        else:
            goes_back = 0 <= parent < number - 1
            edge = "rewind" if goes_back else "continuation"
            chunks.append(turn(command, answer, parent=parent if goes_back else LAST, edge=edge))
    trajectory = make_trajectory(instruction, chunks)
    found = irrelevant_turns(trajectory)
    assert set(found.values()) <= set(REASONS)
    assert set(found) <= set(range(len(chunks)))
    masked = mask_turns(trajectory, MASKS)
    assert [chunk.kind == "context" for chunk in masked.chunks] == [
        number in found for number in range(len(chunks))
    ]
    assert [chunk.action_ids for chunk in masked.chunks] == [chunk.action_ids for chunk in chunks]
    assert mask_turns(masked, MASKS) == masked
    assert all(chunk.kind == "rl" for chunk in trajectory.chunks)  # not changed in place


def kinds_learned(trajectory, masks, **options):
    masked = mask_turns(trajectory, masks, **options)
    [example] = to_examples(
        masked, 0.0, ExampleOptions(64, 16, gamma=1.0, failure_reward=0.0, purpose="sft")
    )
    return list(example["kind"])


def test_each_mask_takes_its_own_turns_out_of_the_loss_and_no_others():
    failed = turn("cat /harbor", "bad call")
    failed.status = "malformed"
    looped = [turn("make check", "error 3")] * 3
    trajectory = make_trajectory("Run make check on harbor.", [failed, *looped])
    assert kinds_learned(trajectory, [ERRORS]) == [CONTEXT, *[IMITATION] * 3]
    assert kinds_learned(trajectory, ["loops"]) == [IMITATION, IMITATION, CONTEXT, CONTEXT]
    assert kinds_learned(trajectory, [ERRORS, "loops"]) == [CONTEXT, IMITATION, CONTEXT, CONTEXT]
    assert kinds_learned(trajectory, []) == [IMITATION] * 4


def test_a_demonstrators_mistake_is_learned_only_without_the_error_mask():
    mistake = turn("cat harbour.txt", "no such file")
    mistake.kind = "context"
    trajectory = make_trajectory("Show harbor.txt.", [mistake, turn("cat harbor.txt", "x")])
    assert kinds_learned(trajectory, MASKS, is_demonstration=True) == [CONTEXT, IMITATION]
    assert kinds_learned(trajectory, [], is_demonstration=True) == [IMITATION, IMITATION]
    assert kinds_learned(trajectory, []) == [CONTEXT, IMITATION]  # another reader's copied context


def test_an_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="'looops' is no mask"):
        parse_masks("errors looops")
    with pytest.raises(ValueError, match="unknown"):
        mask_turns(make_trajectory("", []), ["looops"])
