"""launch.convert: the same weights in every form, and one clear line for what it refuses."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rome.model.config import PRESETS
from rome.model.hf.checkpoint import load_hf, read_config, save_hf
from rome.model.hf.digest import params_digest
from rome.model.lora import Lora, adapter_shapes, find_targets
from rome.model.params import param_shardings
from rome.model.sharding import make_mesh
from rome.stages.weights import load_start
from rome.stopping import Stopped
from rome.train import checkpoint, parameters
from rome.train import convert as conversion
from rome.train.checkpoint import CheckpointError, Checkpoints
from rome.train.convert import convert
from rome.train.parameters import StoredParameters
from rome.train.state import start_state
from rome.train.workdir import MODEL, ConfigError
from tests.paths import ROOT
from tests.processes import user_environment
from tests.rome.model.small import random_params

CONFIG = PRESETS["tiny"]
ODD = np.array([-0.0, 1e-40, np.inf, np.nan], np.float32)


def make_run(workdir, mesh_shape):
    """A workdir with checkpoints of steps 2 and 4 of a tiny model, with an optimizer's moments.

    Returns the parameters of each step.
    """
    mesh = make_mesh(mesh_shape, CONFIG)
    steps = {step: random_params(CONFIG, seed=step) for step in (2, 4)}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    for step, params in steps.items():
        params["layers"]["moe"]["gate"].flat[: len(ODD)] = ODD
        state = start_state(
            jax.device_put(params, param_shardings(mesh, CONFIG)), optax.sgd(0.1, momentum=0.9)
        )
        checkpoints.save(step, state._replace(step=jnp.int32(step)), {"seconds": 1.0})
    checkpoints.close()
    (workdir / "config.json").write_text(
        json.dumps(
            {
                "experiment": "sft",
                "model": "tiny",
                "tokenizer": str(ROOT / "rome/model/tokenizer/tiny"),
            }
        )
    )
    (workdir / MODEL).write_text(json.dumps(CONFIG.to_hf()))
    return steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("convert") / "run"
    return workdir, make_run(workdir, {})


@pytest.fixture(scope="module")
def exported(run):
    """The newest step as a float32 Hugging Face directory."""
    output = run[0].parent / "exported"
    convert(run[0], output, None, None, None)
    return output


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            a.view(f"u{a.dtype.itemsize}"), b.view(f"u{b.dtype.itemsize}")
        )


def files(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_newest_training_step_becomes_a_hugging_face_checkpoint_with_its_tokenizer(
    run, exported
):
    _workdir, steps = run
    loaded, config = load_hf(exported)
    assert_same_bits(loaded, steps[4])
    assert config == dataclasses.replace(CONFIG, remat="full", scan_layers=True)
    assert (exported / "tokenizer.json").read_bytes() == (
        ROOT / "rome/model/tokenizer/tiny/tokenizer.json"
    ).read_bytes()
    assert set(path.name for path in exported.iterdir()) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_a_workdir_may_have_any_name(run, exported, tmp_path):
    workdir = tmp_path / "lr 50%25 #2 a|b? [ä] $x;&'"
    shutil.copytree(run[0], workdir)
    convert(workdir, tmp_path / "out#1", None, None, None)
    assert files(tmp_path / "out#1") == files(exported)


def test_a_start_that_is_interrupted_amid_its_tensors_is_stopped(exported):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    with pytest.raises(Stopped):
        load_start(exported, config, make_mesh({}, config), lambda: True)


def test_a_start_that_changed_since_the_run_began_is_refused_by_field(exported):
    config = dataclasses.replace(CONFIG, rope_theta=5e5, pad_token_id=1)
    with pytest.raises(ConfigError, match=r"rope_theta .10000.0 there, 500000.0 wanted.\. Bring"):
        load_start(exported, config, make_mesh({}, config))


def test_an_earlier_step_and_another_type_are_taken_when_asked_for(run, tmp_path, capsys):
    workdir, steps = run
    said = convert(workdir / "checkpoints", tmp_path / "out", "hf", "bfloat16", 2)
    assert "of step 2, with tokenizer.json" in said
    assert_same_bits(
        load_hf(tmp_path / "out", jnp.bfloat16)[0],
        jax.tree.map(lambda w: w.astype(jnp.bfloat16), steps[2]),
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines
        and all(line.startswith("writing ") and "GB" in line for line in lines)
        and "left" not in lines[-1]
    )


def test_hugging_face_to_orbax_and_back_is_the_same_bytes(exported, tmp_path):
    convert(exported, tmp_path / "orbax", None, None, None)
    assert (
        not list((tmp_path / "orbax").glob("*.safetensors"))
        and (tmp_path / "orbax" / "checkpoints" / "0").is_dir()
    )
    convert(tmp_path / "orbax", tmp_path / "back", None, None, None)
    assert files(tmp_path / "back") == files(exported)


def test_a_run_can_start_from_either_form_straight_on_its_mesh(exported, tmp_path):
    convert(exported, tmp_path / "orbax", None, "bfloat16", None)
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, config)
    one, other = load_start(exported, config, mesh), load_start(tmp_path / "orbax", config, mesh)
    assert_same_bits(
        jax.device_get(other),
        jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16).astype(np.float32), one),
    )
    for params in (one, other):
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == param_shardings(mesh, config)
    with pytest.raises(ValueError, match="does not hold the model"):
        load_start(exported, PRESETS["small"], mesh)


def test_another_type_keeps_what_else_the_config_and_the_folder_say(exported, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files(exported).items():
        (source / name).write_bytes(content)
    spelled = json.loads((source / "config.json").read_text()) | {"transformers_version": "5.0.0"}
    (source / "config.json").write_text(json.dumps(spelled))
    (source / "generation_config.json").write_text('{"top_k": 20}')
    (source / "notes.txt").write_text("not ours to copy")
    convert(source, tmp_path / "half", "hf", "bfloat16", None)
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == spelled | {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    assert {path.name for path in (tmp_path / "half").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
    }
    assert_same_bits(
        load_hf(tmp_path / "half", jnp.bfloat16)[0],
        jax.tree.map(lambda w: w.astype(jnp.bfloat16), load_hf(exported)[0]),
    )


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sharded") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LARGE_BYTES", 100_000)
        return workdir, make_run(workdir, {"fsdp": 2, "expert": 2, "tensor": 2})


@pytest.mark.long
def test_a_large_stack_of_layers_is_stored_a_layer_at_a_time(sharded_run, run):
    def chunk(workdir, *path):
        return (
            StoredParameters(workdir / "checkpoints", 4, CONFIG)
            ._open(path)
            .chunk_layout.read_chunk.shape
        )

    assert chunk(sharded_run[0], "layers", "moe", "gate") == (
        1,
        4,
        64,
        128,
    )  # one layer of one device
    assert chunk(run[0], "layers", "moe", "gate") == (4, 8, 128, 256)  # small ones stay whole


@pytest.mark.parametrize("box_bytes", [20_000, 200_000, 10**9])
def test_sharded_checkpoints_are_streamed_bitwise_in_boxes_of_any_size(
    box_bytes, sharded_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(parameters, "BOX_BYTES", box_bytes)
    convert(sharded_run[0], tmp_path / "out", None, None, 4)
    assert_same_bits(load_hf(tmp_path / "out")[0], sharded_run[1][4])


def test_the_boxes_of_an_array_cover_it_once_along_chunks_where_they_fit(monkeypatch):
    monkeypatch.setattr(parameters, "BOX_BYTES", 4 * 6 * 10)
    for shape, chunk, split in (
        ((5, 8, 10), (1, 3, 10), (0, 1)),
        ((5, 8, 10), (5, 8, 10), (0, 1)),
        ((50, 4), (50, 4), (0,)),
        ((7,), (7,), (0,)),
    ):
        seen = np.zeros(shape, int)
        for starts, stops in parameters._boxes(shape, chunk, 4, split):
            where = tuple(slice(*bounds) for bounds in zip(starts, stops, strict=True))
            seen[where] += 1
            assert seen[where].nbytes // 2 <= 4 * parameters.BOX_BYTES  # int64 against a float32
            assert all(
                start == 0 and stop == size
                for axis, (start, stop, size) in enumerate(zip(starts, stops, shape, strict=True))
                if axis not in split
            )
        assert (seen == 1).all()
    assert {start[1] for start, _ in parameters._boxes((5, 8, 10), (1, 3, 10), 4, (0, 1))} == {0, 6}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(step=3), "--step=3 is not in .* which holds 2, 4"),
        (dict(directory="nowhere"), "--input=nowhere is not a directory"),
        (
            dict(directory="."),
            "holds neither a Hugging Face checkpoint .* nor a training checkpoint",
        ),
        (dict(directory="exported", step=1), "is a Hugging Face checkpoint and has no steps"),
        (dict(output="exported"), "--output=exported exists already"),
        (dict(directory="empty_run"), "is the workdir of a run without checkpoints"),
        (dict(directory="no_model"), "no_model has no model.json; it is written when a run starts"),
        (
            dict(directory="other_model"),
            (
                r"of another model than its config.json says: embed/embedding is .768, 128., not"
                r" .4096, 256.; .*; \.\.\."
            ),
        ),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line_and_leaves_nothing(
    change, message, run, exported, monkeypatch
):
    monkeypatch.chdir(run[0].parent)
    for name, document in (
        ("empty_run", {"experiment": "sft"}),
        ("other_model", json.loads((run[0] / "config.json").read_text())),
        ("no_model", json.loads((run[0] / "config.json").read_text())),
    ):
        pathlib.Path(name).mkdir(exist_ok=True)
        pathlib.Path(name, "config.json").write_text(json.dumps(document))
    for name in ("other_model", "no_model"):
        if not pathlib.Path(name, "checkpoints").exists():
            pathlib.Path(name, "checkpoints").symlink_to(run[0] / "checkpoints")
    pathlib.Path("other_model", MODEL).write_text(json.dumps(PRESETS["small"].to_hf()))
    arguments = dict(directory="run", output="out", step=None) | change
    before = sorted(pathlib.Path.cwd().iterdir())
    with pytest.raises((ValueError, OSError, CheckpointError), match=message) as error:
        convert(
            pathlib.Path(arguments["directory"]),
            pathlib.Path(arguments["output"]),
            None,
            None,
            arguments["step"],
        )
    assert "\n" not in str(error.value)
    assert sorted(pathlib.Path.cwd().iterdir()) == before


def test_too_little_memory_or_disk_is_found_out_before_anything_is_read(
    exported, tmp_path, monkeypatch
):
    monkeypatch.setattr(pathlib.Path, "exists", lambda self: True)
    monkeypatch.setattr(
        conversion.pathlib.Path,
        "read_text",
        lambda self: "MemTotal: 9 kB\nMemAvailable:    1000 kB\n",
    )
    with pytest.raises(
        ValueError, match=r"the parameters take 0.0 GB as float32, and 0.0 GB of memory are free"
    ):
        conversion._check_room(CONFIG, np.dtype(np.float32), tmp_path / "out")


def test_a_conversion_that_is_interrupted_leaves_nothing(exported, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "copy_companions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(exported, tmp_path / "out", "hf", None, None)
    assert not list(tmp_path.iterdir())


def test_a_torn_training_checkpoint_is_one_clear_line(tmp_path):
    make_run(tmp_path / "run", {})
    for path in (tmp_path / "run" / "checkpoints" / "4" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"checkpoints/4/state .*Choose another --step"
    ) as error:
        convert(tmp_path / "run", tmp_path / "out", None, None, None)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


LORA = Lora(4, 8.0, find_targets("all", CONFIG))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run that trained adapters, its base, and the adapters."""
    base = tmp_path_factory.mktemp("lora") / "base"
    save_hf(random_params(CONFIG, seed=7), CONFIG, base)
    shutil.copy(ROOT / "rome/model/tokenizer/tiny/tokenizer.json", base)
    random = np.random.RandomState(0)

    def draw(leaf):
        return (0.1 * random.standard_normal(leaf.shape)).astype(np.float32)

    adapters = jax.tree.map(draw, adapter_shapes(CONFIG, LORA))
    workdir = base.parent / "run"
    noted = {
        "from": str(base),
        "digest": params_digest(random_params(CONFIG, seed=7), CONFIG),
        "dtype": "float32",
    }
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    state = start_state(jax.tree.map(jnp.asarray, adapters), optax.sgd(0.1, momentum=0.9))
    checkpoints.save(3, state._replace(step=jnp.int32(3)), {"seconds": 1.0, "base": noted})
    checkpoints.close()
    document = {
        "experiment": "sft",
        "model": "tiny",
        "tokenizer": str(ROOT / "rome/model/tokenizer/tiny"),
        "init_from": str(base),
        "lora": {"rank": 4, "alpha": 8.0, "targets": "all"},
    }
    (workdir / "config.json").write_text(json.dumps(document))
    (workdir / MODEL).write_text(json.dumps(CONFIG.to_hf()))
    return workdir, base, adapters


@pytest.mark.long
def test_a_run_with_adapters_becomes_its_base_with_them_merged(adapted, tmp_path):
    workdir, base, adapters = adapted
    said = convert(workdir, tmp_path / "merged")
    assert "Hugging Face checkpoint of step 3" in said
    merged, _ = load_hf(tmp_path / "merged")
    before, _ = load_hf(base)
    pair = adapters["layers"]["attention"]["o_lora"]
    product = np.einsum("LNHr,LrD->LNHD", pair["a"], pair["b"]) * LORA.scale
    found = merged["layers"]["attention"]["o"] - before["layers"]["attention"]["o"]
    np.testing.assert_allclose(found, product, atol=1e-6)
    np.testing.assert_array_equal(
        merged["layers"]["moe"]["router"], before["layers"]["moe"]["router"]
    )
    # PEFT's layout merged into the base is the same file
    convert(workdir, tmp_path / "peft", to="peft")
    convert(base, tmp_path / "again", adapter=tmp_path / "peft")
    one, other = files(tmp_path / "merged"), files(tmp_path / "again")
    assert one[pathlib.Path("model.safetensors")] == other[pathlib.Path("model.safetensors")]
    small_type = convert(workdir, tmp_path / "rounded", dtype="bfloat16")
    assert "with tokenizer.json" in small_type


def test_adapters_are_not_merged_into_another_base(adapted, tmp_path):
    workdir, _, _ = adapted
    moved = tmp_path / "run"
    shutil.copytree(workdir, moved)
    other = tmp_path / "base"
    save_hf(random_params(CONFIG, seed=8), CONFIG, other)
    document = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(document | {"init_from": str(other)}))
    with pytest.raises(ValueError, match=r"base has digest \w+, and the adapters of .* bring that"):
        convert(moved, tmp_path / "out")
    (moved / "config.json").write_text(json.dumps(document | {"init_from": str(tmp_path / "x")}))
    with pytest.raises(FileNotFoundError, match="weights that they belong to are not there"):
        convert(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_forms_that_adapters_do_not_have_are_refused(adapted, exported, tmp_path):
    workdir, _, _ = adapted
    with pytest.raises(ValueError, match="does not merge adapters; write --to=hf first"):
        convert(workdir, tmp_path / "out", to="orbax")
    with pytest.raises(ValueError, match=r"writes the adapters of a run, and .* has none"):
        convert(exported, tmp_path / "out", to="peft")
    convert(workdir, tmp_path / "peft", to="peft")
    with pytest.raises(
        ValueError, match=r"is merged into a Hugging Face directory, and .* is a run"
    ):
        convert(workdir, tmp_path / "out", adapter=tmp_path / "peft")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        convert(exported, tmp_path / "out", adapter=tmp_path)


def test_a_start_in_bfloat16_has_float32_parameters_to_train(exported):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = load_start(exported, config, make_mesh({}, config))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.long
def test_the_command_converts_and_misspelt_flags_or_missing_input_are_one_line(exported, tmp_path):
    def command(*arguments):
        environment = user_environment()
        return subprocess.run(
            [sys.executable, "-m", "launch.convert", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=800,
        )

    done = command(
        f"--input={exported}", f"--output={tmp_path / 'out'}", "--to=hf", "--dtype=bfloat16"
    )
    assert done.returncode == 0 and "Hugging Face checkpoint, with tokenizer.json" in done.stdout, (
        done.stderr[-2000:]
    )
    assert read_config(tmp_path / "out") == read_config(exported)
    for arguments, message in (([], "--input"), (["--inptu=x"], "inptu")):
        failed = command(*arguments)
        assert (
            failed.returncode == 1
            and failed.stderr.startswith("launch.convert: ")
            and failed.stderr.count("\n") == 1
            and message in failed.stderr
        )
