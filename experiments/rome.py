r"""The whole pipeline: CPT, SFT in two stages, and IPA, one after the other.

make train CONFIG=experiments/rome.py           # tiny: 48 min on 2 CPU cores at a load of 6 to 28
make train CONFIG=experiments/rome.py:smoke     # runs every stage once; 11 min at a load of 40
python -m launch.train --config=experiments/rome.py:qwen3_30b_a3b \
    --config.engine.urls=http://a:30000,http://b:30000      # a pod; not run

Each stage starts from the one before it: this file from experiments/sft.py:stage2, that from
:stage1, and that from experiments/cpt.py. The same command goes on where a run was stopped or
killed, in whichever stage. report.json has a table `stages`: what each of them added on the
held-out tasks: three seeds end at 82, 89 and 87 % (docs/pipeline.md).
"""

import ml_collections

from experiments import ipa


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    config = ipa.get_config(preset)
    config.experiment = "rome"
    config.init_from = f"experiments/sft.py:stage2_{preset}"
    if preset == "tiny":
        config.steps = 120
        config.minibatches = 1  # as measured (docs/pipeline.md)
    return config
