"""What every stage shares: the evaluations of a workdir that a resumed run goes on with."""

import types

from rome.stages.base import TrainingStage
from rome.train.report import outcomes_path, write_outcomes


def test_a_resumed_run_has_its_evaluations_up_to_its_checkpoint_and_no_other_file(tmp_path):
    for step in (0, 3, 6):
        write_outcomes(tmp_path, "ipa", step, {"bits_per_byte": 2.0, "bytes": 8})
    write_outcomes(tmp_path, "ipa_again", 1, {"bits_per_byte": 2.0, "bytes": 8})
    kept_aside = outcomes_path(tmp_path, "ipa", 3).with_name("ipa_000003_before.json")
    kept_aside.write_text("{}")
    stage = types.SimpleNamespace(config=types.SimpleNamespace(experiment="ipa"), workdir=tmp_path)
    assert [one.step for one in TrainingStage._kept_evaluations(stage, 5)] == [0, 3]
