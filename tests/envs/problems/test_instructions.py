"""Instructions: each family's answer is right by its own text, and nothing cheaper passes."""

import json
import random
import re

import pytest

from envs.gem import make
from envs.problems import LEVELS, InstructionEnv
from envs.problems.instructions import FAMILIES


def listed(text):
    return re.search(r": (.*)\.$", text)[1].split()


CHECKS = {
    "repeat": lambda text: " ".join(listed(text)),
    "upper_case": lambda text: " ".join(word.upper() for word in listed(text)),
    "reverse_order": lambda text: " ".join(reversed(listed(text))),
    "alphabetical": lambda text: " ".join(sorted(listed(text))),
    "without": lambda text: " ".join(
        word for word in listed(text) if word != re.search(r"without (\w+):", text)[1]
    ),
    "extract": lambda text: dict(re.findall(r"(\w+) is in (\w+)\.", text))[
        re.search(r"Where is (\w+)\?", text)[1]
    ],
    "as_json": lambda text: json.dumps(
        {name: int(age) for name, age in re.findall(r"(\w+) is (\d+)", text)}
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_follow_from_the_text_and_cheats_earn_nothing(family):
    for level in LEVELS:
        for seed in range(20):
            env = make(f"rome:text/{family}-{level}", seed=seed)
            text, _ = env.reset()
            assert env.demonstrator_action() == CHECKS[family](text)
            for cheats in env.cheats().values():
                for cheat in cheats:
                    assert env.spawn(same_state=True).step(cheat)[1] == 0.0, cheat
            _, reward, terminated, _, info = env.step(f"  {env.demonstrator_action()}. ")
            assert reward == 1.0 and terminated and info["ending"] == "success"


def test_seeds_alone_decide_the_text_and_an_empty_answer_is_malformed():
    texts = {make("rome:text/all-hard", seed=seed).reset()[0] for seed in range(30)}
    assert len(texts) == 30
    env = InstructionEnv(seed=3)
    assert env.reset()[0] == InstructionEnv(seed=3).reset()[0]
    assert env.step("  ")[4]["ending"] == "malformed"
    with pytest.raises(ValueError, match="unknown"):
        InstructionEnv("spelling")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_a_turn_says_is_the_answer(family):
    env = make(f"rome:text/{family}-easy", seed=1)
    env.reset()
    answer = env.demonstrator_action()
    endings = {
        f"<think>\nIt is easy.\n</think>\n\n{answer}": "success",
        f"<think>{answer}</think>": "malformed",
        f"<think>{answer}": "malformed",
        f"<think>{answer}</think>no": "failure",
    }
    for turn, ending in endings.items():
        assert env.spawn(same_state=True).step(turn)[4]["ending"] == ending, turn


def test_an_object_counts_by_its_value():
    env = make("rome:text/as_json-hard", seed=1)
    env.reset()
    ages = json.loads(env.demonstrator_action())
    backwards = dict(reversed(ages.items()))
    first = next(iter(ages))

    def reward(turn):
        return env.spawn(same_state=True).step(turn)[1]

    assert reward(json.dumps(ages, indent=2)) == reward(json.dumps(backwards)) == 1.0
    assert reward(json.dumps(ages, separators=(",", ":")) + ".") == 1.0
    for wrong in (
        json.dumps({**ages, first: float(ages[first])}),
        json.dumps({**ages, first: str(ages[first])}),
        json.dumps({**ages, "Zoe": 1}),
        json.dumps(sorted(ages.items())),
        json.dumps(ages).replace("{", f'{{"{first}": 1, '),
        "[" * 100_000,
        '{"a": {"b": 1}, "a": 2}',
    ):
        assert reward(wrong) == 0.0, wrong


def test_drawing_any_seed_gives_a_text():
    rng = random.Random(0)
    for family in FAMILIES.values():
        for size in (1, 2, 3):
            text, answer = family(rng, size)
            assert text and answer
