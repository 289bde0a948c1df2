"""The report: bytes add up, a refusal becomes figures and advice, a step that fits gets none."""

import dataclasses
import json
import math
import types

import jax
import pytest

from rome.cost.compile import batch_shapes, visited_rows
from rome.cost.estimate import Program, find_chip, report, state_bytes, too_large
from rome.cost.roofline import CHIPS, GIB, Sent
from rome.losses import LOSSES, LossConfig
from rome.model.config import PRESETS
from rome.model.lora import Lora, adapter_shapes, find_targets
from rome.model.ops.kernels import Kernels
from rome.model.params import parameter_shapes
from rome.model.sharding import make_mesh
from rome.stages.config import load_config
from rome.stages.settings import passes_of_step
from rome.train.state import make_optimizer
from rome.train.step import Learner

CONFIG = PRESETS["qwen3_30b_a3b"]
MESH = {"replica": 1, "fsdp": 8, "expert": 8, "sequence": 1, "tensor": 1}
STATE = {"base": 0.0, "params": 2.0 * GIB, "optimizer": 4.0 * GIB, "gradients": 2.0 * GIB}


def programs(
    temporaries: float = 6.0 * GIB, fits: bool = True, seconds: float = 0.01
) -> dict[str, Program]:
    gather = Sent("all-gather", "fsdp", 48.0, 1e9, seconds, "jit(f)/gather")
    return {
        "accumulate": Program(
            "accumulate",
            60.0,
            4.0 * GIB + temporaries,
            4.0 * GIB,
            temporaries,
            1.5 * GIB,
            flops=2e14,
            traffic=1e11,
            sent=(gather,),
            fits=fits,
        ),
        "apply": Program("apply", 5.0, 9.0 * GIB, 8.0 * GIB, 1.0 * GIB),
    }


def report_of(
    found: dict[str, Program],
    mesh=MESH,
    rows=64,
    chip="v5p",
    state=STATE,
    score=0,
    epochs=1,
    sequence=8192,
) -> dict:
    return report(
        found,
        state,
        CHIPS[chip],
        config=CONFIG,
        mesh=mesh,
        rows=rows,
        length=8192,
        passes={"score": score, "accumulate": epochs},
        sequence_length=sequence,
    )


def test_bytes_by_kind_add_up_to_the_peak_and_the_report_is_json():
    found = report_of(programs())
    assert (
        found["bytes_per_device"] == sum(found["bytes"].values()) == 14 * GIB
    )  # accumulate with the optimizer beside it
    assert found["bytes"]["activations"] == 1.5 * GIB and found["bytes"]["temporaries"] == 4.5 * GIB
    assert found["fits"] and found["peak_program"] == "accumulate" and found["advice"] == []
    assert {"params", "optimizer", "activations", "temporaries"} <= found["bytes"].keys()
    assert {"bytes_per_device", "flops", "collective_bytes", "roofline_mfu"} <= json.loads(
        json.dumps(found)
    ).keys()


def test_the_mfu_bound_falls_with_the_work_that_the_model_did_not_ask_for():
    found = report_of(programs())
    assert found["roofline_mfu"] == pytest.approx(
        found["model_flops"] / found["flops"]
    )  # bound by compute alone
    assert found["roofline_mfu_serial"] < found["roofline_mfu"]


def test_the_bound_is_of_every_pass_that_a_step_makes_over_its_data():
    update_alone = report_of(programs())
    scored = dataclasses.replace(programs()["accumulate"], name="score", flops=5e13)
    found = programs() | {"score": scored}
    with_scoring = report_of(found, score=1)
    assert with_scoring["flops"] == 2.5e14
    assert with_scoring["model_flops"] == update_alone["model_flops"]  # scoring is no credit
    assert with_scoring["roofline_mfu"] == pytest.approx(
        with_scoring["model_flops"] / with_scoring["flops"]
    )
    assert with_scoring["roofline_mfu"] < with_scoring["roofline_mfu_serial"] * 1.1
    twice = report_of(found, score=1, epochs=2)
    assert twice["flops"] == 4.5e14
    assert twice["model_flops"] == 2 * update_alone["model_flops"]
    assert update_alone["roofline_mfu"] > twice["roofline_mfu"] > with_scoring["roofline_mfu"]
    # programs run one after the other: what one waits for hides nothing of the next
    waiting = found | {"score": dataclasses.replace(scored, traffic=1e13)}
    extra = 1e13 / CHIPS["v5p"].hbm - 5e13 / CHIPS["v5p"].peak_flops
    of = report_of(waiting, score=1)
    seconds = [one["model_flops"] / one["roofline_mfu"] for one in (of, with_scoring)]
    assert (seconds[0] - seconds[1]) / CHIPS["v5p"].peak_flops == pytest.approx(extra)


def test_short_sequences_that_share_a_row_are_credited_with_their_own_attention():
    whole, short = (report_of(programs(), sequence=length) for length in (8192, 1024))
    assert whole["flops"] == short["flops"]
    assert short["model_flops"] < whole["model_flops"]
    assert short["roofline_mfu"] < whole["roofline_mfu"]


@pytest.mark.parametrize(
    ("exchange", "rows_of_tiles"),
    [
        # 4 rows of 1024 tokens a device, 8 experts each, over 2 devices and 64 experts a device
        ("ring", 4096 * 8 / 2 + 63 * 128),
        # in two chunks of 2048 tokens, whose choices are exchanged in two parts by experts
        ("all_to_all", (2048 * 8 + 63 * 128) / 2),
    ],
)
def test_tiles_that_two_experts_share_are_computed_twice(exchange, rows_of_tiles):
    learner = types.SimpleNamespace(
        mesh=make_mesh({"fsdp": 4, "expert": 2}),
        model_config=CONFIG,
        chosen_kernels=Kernels("splash", "megablox", exchange),
    )
    batch = batch_shapes(32, 1024, 4, None)
    assert visited_rows(learner, batch) == rows_of_tiles
    even = rows_of_tiles - 63 * 128 / (2 if exchange == "all_to_all" else 1)
    assert visited_rows(learner, batch, imbalance=1.5) == rows_of_tiles + even / 2


@pytest.mark.parametrize(
    ("experiment", "changes", "passes"),
    [
        ("ipa", {}, (1, 1)),
        ("ipa", {"epochs": 2}, (1, 2)),
        ("ipa", {"epochs": 2, "logp_old_from": "rollout"}, (2, 2)),
        ("sft", {}, (1, 1)),  # a pass that counts the choices of experts
    ],
)
def test_a_configs_step_is_what_is_counted(experiment, changes, passes):
    config = load_config(f"experiments/{experiment}.py", "qwen3_30b_a3b")
    for key, value in changes.items():
        config[key] = value
    counted = passes_of_step(config, balances_experts=True)
    assert counted == dict(zip(("score", "accumulate"), passes, strict=True))
    scores = config.get("logp_old_from") == "trainer"
    assert passes_of_step(config, balances_experts=False)["score"] == scores


def test_slow_collectives_are_named_with_a_remedy():
    (line,) = report_of(programs(seconds=1.0))["advice"]
    assert (
        "all-gather over fsdp" in line
        and "--config.rows_per_microbatch=192 does 3 times the work" in line
    )


def test_what_does_not_fit_says_how_much_and_what_would():
    found = report_of(programs(temporaries=100.0 * GIB), rows=256)
    assert not found["fits"]
    first, *others = found["advice"]
    assert first.startswith("12.3 GiB too much; the largest part is temporaries")
    assert others[0].startswith(
        "--config.rows_per_microbatch=64: one row a device instead of 4, about 75.0 GiB less"
    ) and others[0].endswith("enough alone")


def test_whole_copies_of_the_state_are_the_first_thing_to_give_up():
    state = {kind: 16 * size for kind, size in STATE.items()}
    found = report_of(
        programs(temporaries=40.0 * GIB), mesh=MESH | {"replica": 4, "fsdp": 2}, state=state
    )
    assert not found["fits"] and any(
        line.startswith("--config.mesh.replica=1 --config.mesh.fsdp=8") for line in found["advice"]
    )


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            (
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
                " temporaries (2.00T) exceeds available HBM (95.74G)."
            ),
            2 * 2**40 + 4 * GIB,
        ),
        (
            (
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory"
                " space hbm. Used 122.50G of 95.74G hbm. Exceeded hbm capacity by 26.76G."
            ),
            122.5 * GIB,
        ),
    ],
)
def test_a_refusal_for_memory_becomes_figures(message, needed):
    program = too_large("accumulate", RuntimeError(message), 3.0, STATE)
    assert program.needed == pytest.approx(needed) and not program.fits
    found = report_of({"accumulate": program})
    assert (
        not found["fits"]
        and found["bytes_per_device"] == pytest.approx(needed + 4 * GIB)
        and found["advice"]
        and "roofline_mfu" not in found
    )
    assert sum(found["bytes"].values()) == pytest.approx(found["bytes_per_device"])


def test_any_other_failure_of_the_compiler_stays_what_it_is():
    with pytest.raises(RuntimeError, match="Mosaic"):
        too_large("accumulate", RuntimeError("INTERNAL: Mosaic failed"), 3.0, STATE)


def test_state_bytes_are_a_devices_share():
    config = PRESETS["tiny"]
    optimizer = make_optimizer(
        learning_rate=1e-3, warmup_updates=0, decay_updates=0, weight_decay=0.0, clip=1.0
    )
    learner = Learner(
        config, LOSSES["ipa"], LossConfig(), optimizer, make_mesh({"fsdp": 4, "expert": 2}, config)
    )
    found, weights = (
        state_bytes(learner),
        sum(4 * math.prod(leaf.shape) for leaf in learner.state.params["layers"]["moe"].values()),
    )
    assert (
        found["optimizer"] == pytest.approx(2 * found["params"], rel=1e-4)
        and found["gradients"] == found["params"]
    )
    assert weights / 8 < found["params"] < weights / 6


def test_adapters_leave_the_optimizer_small_and_the_base_in_its_own_type():
    config = dataclasses.replace(PRESETS["tiny"], dtype="bfloat16")
    lora = Lora(4, 8.0, find_targets("all", config))
    optimizer = make_optimizer(
        learning_rate=1e-3, warmup_updates=0, decay_updates=0, weight_decay=0.0, clip=1.0
    )
    learner = Learner(
        config, LOSSES["ipa"], LossConfig(), optimizer, make_mesh({}, config), lora=lora
    )
    found = state_bytes(learner)
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))
    adapters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapter_shapes(config, lora)))
    assert found["base"] == 2 * whole
    assert found["params"] == found["gradients"] == 4 * adapters < found["base"] / 5
    assert found["optimizer"] == pytest.approx(8 * adapters, rel=1e-4)


def test_an_unknown_chip_is_refused_by_name():
    with pytest.raises(ValueError, match="no known chip; choose one of v5e:SHAPE, v5p:SHAPE"):
        find_chip("v9:2x2")
