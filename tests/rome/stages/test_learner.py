"""The learner of a config: what its mesh cannot hold is refused before anything is started."""

import pytest

from rome.model.config import PRESETS
from rome.stages.config import load_config
from rome.stages.learner import make_learner


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh.replica": 4, "mesh.fsdp": 2, "rows_per_microbatch": 6}, "6 rows"),
        ({"mesh.replica": 2, "mesh.sequence": 4, "row_length": 162}, "162"),
    ],
)
def test_rows_that_the_mesh_does_not_divide_are_refused_with_what_fits(changes, message):
    config = load_config("experiments/sft.py", "tiny")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=f"does not fit: .*{message}"):
        make_learner(config, PRESETS["tiny"])
