"""The benchmark of prefix trees: its cases share what they say, and its report has the keys that
programs read.
"""

import json
import random

import pytest

from benchmarks.prefix_tree import CASES, main, packed, summary


def test_all_cases_but_apart_save_tokens_and_rows():
    for name, make in CASES.items():
        episodes = make(random.Random(0), 2, 768)
        shared, alone = (packed(episodes, way, 4096, 64, 1) for way in (True, False))
        tokens, others = (
            sum(int((batch.segments_BT > 0).sum()) for batch in batches)
            for batches in (shared, alone)
        )
        assert (tokens == others) if name == "apart" else (tokens < 0.7 * others), name
        assert len(shared) <= len(alone)


def test_the_figures_of_a_report_leave_out_what_shares_nothing():
    def case(name, tokens, saved, seconds, error):
        return {
            "name": name,
            "tokens": tokens,
            "tokens_saved": saved,
            "seconds": seconds,
            "processor_seconds": seconds,
            "gradient_error": error,
        }

    cases = [
        case("groups", 100, 0.5, [1.0, 3.0], 1e-7),
        case("forks", 300, 0.7, [1.0, 5.0], 2e-7),
        case("apart", 500, 0.0, [9.0, 9.0], 3e-7),
    ]
    found = summary(cases)
    assert found["tokens_saved"] == pytest.approx(0.65)
    assert found["speedup"] == found["processor_speedup"] == 4.0
    assert found["gradient_error"] == 3e-7


@pytest.mark.slow
def test_a_report_is_written_with_the_keys_that_programs_read(tmp_path):
    file = tmp_path / "found.json"
    sizes = ["--groups", "1", "--prompt", "200", "--length", "1280", "--pairs", "1"]
    main(["--json", str(file), "--size", "tiny", "--cases", "groups", *sizes])
    found = json.loads(file.read_text())
    assert 0 < found["tokens_saved"] < 1
    assert found["speedup"] > 0
    assert found["gradient_error"] < 1e-5
