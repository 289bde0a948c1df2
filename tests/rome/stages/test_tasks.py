"""The default config plays the episodes that it has always played."""

import random
import types

from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES
from rome.data.seeds import derive_seed
from rome.rollout.curriculum import FLOOR, UNSOLVED, Curriculum
from rome.stages.config import load_config
from rome.stages.evaluate import keyed
from rome.stages.planner import Planner
from rome.stages.sft import SFTStage, deal_families
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


def test_a_family_that_any_source_trains_on_is_not_called_unseen():
    config = load_config("experiments/sft.py", "tiny")
    assert tasks_of(config).unseen_families() == set(HELD_OUT_FAMILIES)
    first, *others = HELD_OUT_FAMILIES
    config.demonstration_task = f"0.9*terminal + 0.1*terminal:{first}"
    assert tasks_of(config).unseen_families() == set(others)
    config.demonstration_task = ""
    config.task, config.eval_task = "terminal:held_out", "terminal"
    assert tasks_of(config).unseen_families() == set()


def test_neither_groups_nor_demonstrations_play_an_instance_that_is_evaluated(tmp_path):
    for experiment in ("ipa", "sft"):
        config = load_config(f"experiments/{experiment}.py", "tiny")
        config.task = "problems:math/grid_paths"
        tasks = tasks_of(config)
        evaluated = {task.content_digest() for task in tasks.evaluation.evaluation(18)}
        assert config.eval_tasks == 18
        if experiment == "ipa":
            planner = Planner(config, players=None, files=tmp_path)
            names = [plan.task for wave in range(8) for plan in planner.plan_wave(wave)]
            names += [planner.plan_replacement(number, 1).task for number in range(50)]
        else:
            config.demonstrations = 200
            stage = SFTStage.__new__(SFTStage)  # without engines
            stage.config = config
            stage.players = types.SimpleNamespace(tasks=tasks)
            names = [shown.task for shown in stage._shown]
        assert len(names) >= 200
        assert not [name for name in names if tasks.find(name).content_digest() in evaluated]
