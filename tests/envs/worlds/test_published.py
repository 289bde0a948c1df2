"""The published formats over the worlds here: their fields are read, their rules are applied, and
what is not here is refused by name.
"""

import copy
import json

import pytest

from envs.gem import format_tool_call, make
from envs.worlds import bfcl, tau2
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
            lambda e, t: e.update(involved_classes=["GorillaFileSystem"]),
            "'GorillaFileSystem' has no backend here; there are travel, shop, gui",
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


# -- tau2
# -------------------------------------------------------------------------------------------------


def write_tau2(folder, change=lambda task: None, name="shop"):
    """A domain of one task: a cancellation."""
    env = make("rome:shop/hard", seed=1)
    env.reset()
    database = copy.deepcopy(env.scenario.database)
    order = next(one for one, order in database["orders"].items() if order["status"] == "pending")
    status = ["orders", order, "status"]
    task = {
        "id": "0",
        "description": {"purpose": "a test"},
        "user_scenario": {
            "persona": None,
            "instructions": {
                "domain": name,
                "reason_for_call": "Cancel my order.",
                "known_info": f"The order is {order}.",
                "unknown_info": None,
                "task_instructions": "Be brief.",
            },
        },
        "initial_state": None,
        "evaluation_criteria": {
            "actions": [
                {"action_id": "a", "name": "list_orders", "arguments": {"customer_id": "nobody"}},
                {
                    "action_id": "b",
                    "requestor": "assistant",
                    "name": "cancel_order",
                    "arguments": {"order_id": order},
                    "compare_args": ["order_id"],
                },
            ],
            "env_assertions": [
                {
                    "env_type": "assistant",
                    "func_name": "assert_state",
                    "arguments": {"path": status, "value": "pending"},
                    "assert_value": False,
                }
            ],
            "communicate_info": ["1234 euros"],
            "nl_assertions": ["is polite"],
            "reward_basis": ["DB", "COMMUNICATE", "ENV_ASSERTION"],
        },
    }
    change(task)
    domain = folder / name
    domain.mkdir(exist_ok=True)
    (domain / "db.json").write_text(json.dumps(database))
    (domain / "tasks.json").write_text(json.dumps([task]))
    (domain / "policy.md").write_text("Be kind.")
    return domain, order


def test_tau2_reward_is_the_product_of_its_parts(tmp_path):
    domain, order = write_tau2(tmp_path)
    (task,) = tau2.load(domain)
    env, cancel = task.make_env(), calls_of("cancel_order", order_id=order)
    assert env.reset()[0] == "Be kind.\n\nUser: Cancel my order."
    reward, info, seen = play(env, ["Which order?", *cancel, "You get 1,234 Euros."])
    assert (
        reward == 1.0
        and f"The order is {order}. Be brief." in seen[1]
        and info["reward_parts"] == {"DB": 1.0, "COMMUNICATE": 1.0, "ENV_ASSERTION": 1.0}
    )
    assert play(env, env.scenario.demonstration)[0] == 1.0
    for actions, failed in (
        ([], {"DB", "COMMUNICATE", "ENV_ASSERTION"}),
        ([*cancel, "done"], {"COMMUNICATE"}),
        (["It is done: 1234 euros"], {"DB", "ENV_ASSERTION"}),
    ):
        reward, info, _ = play(env, actions)
        assert (
            reward == 0.0
            and {name for name, value in info["reward_parts"].items() if value == 0.0} == failed
        )
    assert all(play(env, actions)[0] == 0.0 for actions in env.cheats().values())


def test_tau2_actions_count_in_shares_where_the_basis_has_them(tmp_path):
    domain, order = write_tau2(
        tmp_path, lambda task: task["evaluation_criteria"].update(reward_basis=["ACTION"])
    )
    (task,) = tau2.load(domain)
    assert play(task.make_env(), calls_of("cancel_order", order_id=order))[0] == 0.5
    assert (
        play(
            task.make_env(),
            calls_of("cancel_order", order_id=order)
            + calls_of("list_orders", customer_id="nobody"),
        )[0]
        == 1.0
    )
    assert play(task.make_env(), calls_of("cancel_order", order_id="W1"))[0] == 0.0


def test_tau2_the_initial_state_is_applied(tmp_path):
    def begun(task):
        order = task["evaluation_criteria"]["actions"][1]["arguments"]["order_id"]
        task["initial_state"] = {
            "initialization_data": {"agent_data": {"orders": {order: {"address": "Far Road 1"}}}},
            "initialization_actions": [
                {
                    "env_type": "assistant",
                    "func_name": "change_address",
                    "arguments": {"order_id": order, "address": "Near Road 2"},
                }
            ],
            "message_history": [
                {"role": "user", "content": "Hello."},
                {"role": "assistant", "content": "Hello, how can I help?"},
            ],
        }

    domain, order = write_tau2(tmp_path, begun)
    (task,) = tau2.load(domain)
    assert task.database["orders"][order]["address"] == "Near Road 2"
    assert (
        "User: Hello.\nYou: Hello, how can I help?\nUser: Cancel my order."
        in task.make_env().reset()[0]
    )


def criteria(**changes):
    return lambda task: task["evaluation_criteria"].update(changes)


@pytest.mark.parametrize(
    "change, says",
    [
        (criteria(reward_basis=["DB", "NL_ASSERTION"]), "'NL_ASSERTION' cannot be computed here"),
        (
            criteria(actions=[{"name": "cancel_order", "arguments": {"order_id": "W0"}}]),
            "the golden action cancel_order",
        ),
        (
            criteria(actions=[{"name": "toggle_roaming", "arguments": {}, "requestor": "user"}]),
            "requestor is 'user'",
        ),
        (criteria(actions=[{"name": "think", "arguments": {}}]), "there is no tool"),
        (
            criteria(
                env_assertions=[
                    {"env_type": "assistant", "func_name": "assert_data_usage", "arguments": {}}
                ]
            ),
            "'assert_data_usage' is unknown",
        ),
        (lambda task: task.pop("id"), "'id' is NoneType"),
        (
            lambda task: task.update(
                initial_state={"initialization_data": {"user_data": {"a": 1}}}
            ),
            "user_data",
        ),
        (
            lambda task: task.update(
                initial_state={
                    "initialization_actions": [
                        {
                            "env_type": "assistant",
                            "func_name": "cancel_order",
                            "arguments": {"order_id": "W0"},
                        }
                    ]
                }
            ),
            "initial_state cannot be reached",
        ),
    ],
)
def test_tau2_what_cannot_be_graded_is_refused_with_its_place(tmp_path, change, says):
    domain, _ = write_tau2(tmp_path, change)
    with pytest.raises(FormatError) as caught:
        tau2.load(domain)
    assert says in str(caught.value) and "tasks.json: task 0" in str(caught.value)


def test_tau2_domains_of_others_are_refused_by_name(tmp_path):
    domain, _ = write_tau2(tmp_path, name="airline")
    with pytest.raises(FormatError, match="'airline' has no backend here"):
        tau2.load(domain)
