"""The default config plays the episodes that it has always played."""

import random

from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES
from rome.data.seeds import derive_seed
from rome.rollout.curriculum import FLOOR, UNSOLVED, Curriculum
from rome.stages.config import load_config
from rome.stages.evaluate import keyed
from rome.stages.sft import deal_families
from rome.stages.tasks import tasks_of


def test_the_curriculum_draws_its_tasks_as_before(tmp_path):
    source = tasks_of(load_config("experiments/ipa.py", "tiny")).train
    rates = {family: 0.1 * (number % 10) for number, family in enumerate(FAMILIES)}
    shares = [(share.weight, share.families) for share in source.shares]
    curriculum = Curriculum(source.families, rates, shares)
    rng, other = random.Random("tasks/0/3"), random.Random("tasks/0/3")
    weights = [(p + UNSOLVED) * (1 - p) + FLOOR for p in rates.values()]
    expected = other.choices(FAMILIES, weights, k=32)
    assert curriculum.draw(32, rng) == expected
    index = rng.randrange(1_000_000)
    assert source.train("count", index).name == f"count/{index}"


def test_evaluations_play_the_same_tasks_with_the_same_seeds_as_before():
    config = load_config("experiments/ipa.py", "tiny")
    config.seed = 3
    found = [
        (task.name, derive_seed(3, "eval", key))
        for task, key in keyed(tasks_of(config).evaluation.evaluation(2))
    ]
    assert found == [
        (f"{family}/{1_030_000 + index}", derive_seed(3, "eval", f"{family}/{1_000_000 + index}"))
        for family in (*FAMILIES, *HELD_OUT_FAMILIES)
        for index in range(2)
    ]
    source = tasks_of(config).evaluation
    assert source.held_out == HELD_OUT_FAMILIES


def test_demonstrators_show_the_families_in_turn_and_mixtures_by_weight():
    shares = tasks_of(load_config("experiments/sft.py", "tiny")).train.shares
    families = [FAMILIES[number % len(FAMILIES)] for number in range(50)]
    assert deal_families(shares, 50) == [(0, family) for family in families]
    config = load_config("experiments/sft.py", "tiny")
    config.task = "3*terminal:count,sum + 1*games:wordle"
    dealt = deal_families(tasks_of(config).train.shares, 8)
    assert sorted(dealt) == sorted(
        [*[(0, "terminal:count,sum#count"), (0, "terminal:count,sum#sum")] * 3]
        + [(1, "games:wordle#game/wordle")] * 2
    )


def test_a_mixture_draws_by_its_weights_whatever_the_families_rates_are():
    config = load_config("experiments/ipa.py", "tiny")
    config.task = "0.75*terminal + 0.25*games:wordle"
    source = tasks_of(config).train
    rates = dict.fromkeys(source.families, 0.0) | {"games:wordle#game/wordle": 0.5}
    shares = [(share.weight, share.families) for share in source.shares]
    drawn = Curriculum(source.families, rates, shares).draw(4000, random.Random(0))
    share = sum(family == "games:wordle#game/wordle" for family in drawn) / 4000
    assert abs(share - 0.25) < 0.03  # 4.4 standard deviations
