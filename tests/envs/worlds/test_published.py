"""The published formats over the worlds here: their fields are read, their rules are applied, and
what is not here is refused by name.
"""

import json

import pytest

from envs.gem import format_tool_call, make
from envs.worlds import bfcl
from envs.worlds.published import FormatError
from tests.envs.worlds.playing import calls, play


def python_call(call):
    return (
        f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"
    )


def write_bfcl(folder, change=lambda entry, truth: None, parts=("travel", "shop")):
    """A file of one entry: a flight is booked, a product looked up, an order changed or cancelled;
    each a turn.
    """
    trip, order = make("rome:travel/easy", seed=1), make("rome:shop/easy", seed=4)
    trip.reset(), order.reset()
    (book,) = trip.scenario.golden
    config = {"travel": trip.scenario.database, "shop": order.scenario.database}
    entry = {
        "id": "multi_turn_base_0",
        "question": [
            [{"role": "user", "content": "Book it."}],
            [{"role": "user", "content": "What products are there?"}],
            [{"role": "user", "content": "Sing."}],
            [{"role": "user", "content": "And the order."}],
        ],
        "initial_config": {name: config[name] for name in parts},
        "path": [],
        "involved_classes": list(parts),
    }
    truth = {
        "id": "multi_turn_base_0",
        "ground_truth": [
            [python_call(book)],
            ["list_products()"],
            [],
            list(map(python_call, order.scenario.golden)),
        ],
    }
    change(entry, truth)
    (folder / "possible_answer").mkdir(exist_ok=True)
    for path, line in (
        (folder / "BFCL_v4_multi_turn_base.json", entry),
        (folder / "possible_answer" / "BFCL_v4_multi_turn_base.json", truth),
    ):
        path.write_text(json.dumps(line) + "\n\n")
    return folder / "BFCL_v4_multi_turn_base.json"


@pytest.fixture
def played(tmp_path):
    """(environment, its true calls by turn as actions)."""
    (entry,) = bfcl.load(write_bfcl(tmp_path))
    return entry.make_env(), [calls(*turn) for turn in entry.truth]


def with_done(*by_turn):
    return [action for turn in by_turn for action in (*turn, "done")]


def test_bfcl_the_true_calls_are_right_and_nothing_is_not(played):
    env, truth = played
    assert (
        play(env, with_done(*truth))[0] == 1.0 and play(env, env.scenario.demonstration)[0] == 1.0
    )
    reward, info, seen = play(env, [])
    assert (
        reward == 0.0 and "turn 0: no call" in info["note"] and any("Sing." in one for one in seen)
    )
    assert all(play(env, actions)[0] == 0.0 for actions in env.cheats().values())


def test_bfcl_state_is_compared_after_each_turn_and_answers_over_all_turns_so_far(played):
    env, truth = played
    late = play(env, with_done((), truth[1], (), (*truth[0], *truth[3])))
    assert late[0] == 0.0 and "turn 0" in late[1]["note"]
    products_early = with_done(
        (*truth[1], *truth[0]), calls_of("list_orders", customer_id="C1"), (), truth[3]
    )
    assert (
        play(env, products_early)[0] == 1.0
    )  # an answer may come from an earlier turn, but the turn needs a call
    without = play(
        env, with_done(truth[0], calls_of("list_orders", customer_id="C1"), (), truth[3])
    )
    assert without[0] == 0.0 and "answers of the true calls were never seen" in without[1]["note"]
    assert (
        play(env, with_done(truth[0], truth[1], truth[1], truth[3]))[0] == 1.0
    )  # a turn without true calls is not checked
    order = sorted(env.database["shop"]["orders"])[0]
    extra = play(
        env,
        with_done(
            truth[0],
            (
                *truth[1],
                *calls_of("change_address", order_id=order, address="x"),
                *calls_of("cancel_order", order_id=order),
            ),
            (),
            truth[3],
        ),
    )
    assert extra[0] == 0.0 and "the state of shop differs" in extra[1]["note"]


def calls_of(name, **arguments):
    return [format_tool_call(name, arguments)]


def test_bfcl_functions_that_come_later_are_not_there_before(tmp_path):
    def later(entry, truth):
        entry.update(missed_function={"1": ["list_products"]}, excluded_function=["get_product"])
        entry["question"][1] = []

    (entry,) = bfcl.load(write_bfcl(tmp_path, later))
    env, truth = entry.make_env(), [calls(*turn) for turn in entry.truth]
    _, info = env.reset()
    assert not {"list_products", "get_product"} & {
        tool["function"]["name"] for tool in info["tools"]
    }
    assert "there is no tool" in env.step(truth[1][0])[0]
    reward, _, seen = play(env, with_done(*truth))
    assert reward == 1.0 and any(
        "More functions" in one and '"list_products"' in one for one in seen
    )


def test_bfcl_a_turn_has_20_steps(played):
    env, truth = played
    reward, info, _ = play(env, [*truth[0], *calls_of("list_products") * 25])
    assert reward == 0.0 and "more than 20 steps" in info["note"] and info["step_counter"] == 20


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda e, t: e.update(involved_classes=["OtherAPI"]),
            "'OtherAPI' has no backend here; there are travel, shop, gui",
        ),
        (lambda e, t: e.update(question=[]), "4 turns and the question 0"),
        (lambda e, t: t.update(id="other"), "'multi_turn_base_0' has no line"),
        (lambda e, t: e.update(initial_config=[]), "'initial_config' is list"),
        (
            lambda e, t: t["ground_truth"].__setitem__(0, ["open('/etc/passwd')"]),
            "no known function",
        ),
        (
            lambda e, t: t["ground_truth"].__setitem__(0, ["list_products(x=__import__('os'))"]),
            "no call with literal",
        ),
        (
            lambda e, t: t["ground_truth"].__setitem__(0, ["book_flight('T1', 'F1')"]),
            "do not run on initial_config",
        ),
        (lambda e, t: e["initial_config"].update(shop={}), "do not run on initial_config"),
    ],
)
def test_bfcl_what_cannot_be_played_is_refused_with_its_place(tmp_path, change, says):
    path = write_bfcl(tmp_path, change)
    with pytest.raises(FormatError) as caught:
        bfcl.load(path)
    assert says in str(caught.value) and ("BFCL_v4_multi_turn_base.json:1" in str(caught.value))


def test_a_database_of_another_shape_breaks_no_episode(tmp_path):
    def hollow(entry, truth):
        entry["initial_config"]["travel"]["travellers"] = {"T1": {}}
        truth["ground_truth"][0] = []

    (entry,) = bfcl.load(write_bfcl(tmp_path, hollow))
    env = entry.make_env()
    env.reset()
    observation, *_, info = env.step(calls_of("find_traveller", email="x")[0])
    assert "the system failed (KeyError)" in observation and info["status"] == "tool_error"
    assert [play(env, actions)[0] for actions in env.cheats().values()] == [0.0] * 4
