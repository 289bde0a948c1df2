"""The Colab notebook runs from top to bottom in a kernel, in this checkout."""

import json
import os
import re
import subprocess

import nbclient
import nbformat
import pytest

from rome.stages.config import check_config, load_config
from rome.train.devices import Machine, divide_for
from rome.train.metrics import MetricsWriter
from rome.train.report import EvalResult, write_report
from rome.train.workdir import flatten
from tests.paths import ROOT

NOTEBOOK = ROOT / "experiments" / "colab.ipynb"


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in (
        "MAKEFLAGS",
        "MFLAGS",
        "MAKELEVEL",
        "XLA_FLAGS",
        "CONFIG",
        "WORKDIR",
        "ARGS",
        "PYTHON",
    ):  # of a `make test` around this one
        monkeypatch.delenv(name, raising=False)
    for name in (
        "JUPYTER_DATA_DIR",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_RUNTIME_DIR",
        "IPYTHONDIR",
    ):  # and no kernel or profile of the user's
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def load(workdir, **replaced):
    """The notebook with its WORKDIR moved, and cells `replaced` by id.

    A line to replace must be there.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell["id"]: cell for cell in notebook.cells}
    assert 'WORKDIR = "runs/colab"' in cells["settings"].source
    cells["settings"].source = cells["settings"].source.replace('"runs/colab"', repr(str(workdir)))
    for name, source in replaced.items():
        cells[name].source = source
    return notebook


def execute(notebook, folder, timeout):
    nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    return [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]


def finished_run(workdir):
    def result(step, solved):
        return EvalResult.from_tasks(
            "ipa",
            step,
            [
                {
                    "task": f"find/{seed}",
                    "family": "find",
                    "source": "terminal",
                    "difficulty": "easy",
                    "success": seed < solved,
                    "unseen_family": False,
                }
                for seed in range(10)
            ],
        )

    with MetricsWriter(workdir, "ipa", -1, tensorboard=False) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"reward": 0.1 * step})
    write_report(
        workdir,
        {
            "experiment": "ipa",
            "seed": 0,
            "steps": 3,
            "wall_seconds": 90.0,
            "isolation": "bubblewrap",
            "evals": [result(0, 2), result(3, 9)],
        },
    )


def test_the_notebook_is_valid_and_carries_no_output():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(
        not cell.outputs and cell.execution_count is None
        for cell in notebook.cells
        if cell.cell_type == "code"
    )


def test_the_training_cell_asks_make_for_the_smoke_preset(environment):
    notebook = json.loads(NOTEBOOK.read_text())
    sources = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    assert '!make train CONFIG=$CONFIG WORKDIR=$WORKDIR ARGS="$ARGS"' in sources["train"]
    settings = settings_of(sources["settings"], "cpu")
    dry = ["make", "-n", "train", *(f"{name}={settings[name]}" for name in MAKE_VARIABLES)]
    commands = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m launch.train --config='experiments/ipa.py:smoke' --workdir='runs/colab'" in commands


MAKE_VARIABLES = ("CONFIG", "WORKDIR", "ARGS")


def settings_of(source, runtime):
    """What the first cell sets where its reader has named this runtime."""
    assert 'RUNTIME = "cpu"' in source
    settings = {}
    exec(source.replace('RUNTIME = "cpu"', f"RUNTIME = {runtime!r}"), settings)
    return settings


@pytest.mark.parametrize("runtime", ["cpu", "t4", "tpu"])
def test_every_path_names_keys_that_there_are_and_values_of_their_type(runtime):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    source = next(cell.source for cell in notebook.cells if cell["id"] == "settings")
    settings = settings_of(source, runtime)
    path, _, preset = settings["CONFIG"].partition(":")
    config = load_config(path, preset or "tiny")
    for argument in settings["ARGS"].split():
        name, value = re.fullmatch(r"--config\.([a-z_.]+)=(\S+)", argument).groups()
        default = flatten(config.to_dict())[name]
        config.update_from_flattened_dict({name: type(default)(value)})
    if runtime != "t4":  # its model is a folder that is not here
        check_config(config)


@pytest.mark.parametrize(
    "machine, is_inside",
    [(Machine("cpu"), False), (Machine("gpu", ("0",)), True), (Machine("tpu", ("0",)), True)],
)
def test_on_colabs_one_device_the_engine_is_inside_the_trainer(machine, is_inside):
    config = load_config("experiments/ipa.py", "tiny")
    assert divide_for(config, machine, True, {}).is_inside == is_inside


@pytest.mark.long
def test_a_finished_run_is_drawn_from_any_folder_of_the_checkout(environment, tmp_path):
    finished_run(tmp_path / "run")
    outputs = execute(
        load(tmp_path / "run", train="assert pathlib.Path('launch/setup.sh').exists()"),
        ROOT / "experiments",
        timeout=60,
    )
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    text = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )
    assert "3 steps in 1.5 minutes, sandbox isolation: bubblewrap" in text and "+70" in text


def test_a_training_run_that_fails_stops_the_notebook_and_says_so(environment, tmp_path):
    source = nbformat.read(NOTEBOOK, as_version=4)
    train = next(cell.source for cell in source.cells if cell["id"] == "train").replace(
        "make train", "make no_such_target"
    )
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="Training did not finish"):
        execute(load(tmp_path / "run", train=train), ROOT, timeout=60)


def test_outside_a_checkout_the_notebook_asks_for_the_repository(environment, tmp_path):
    with pytest.raises(
        nbclient.exceptions.CellExecutionError, match="Set REPOSITORY in the first cell"
    ):
        execute(load(tmp_path / "run"), tmp_path, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_trains_the_smoke_preset_and_draws_its_curve(environment, tmp_path):
    assert os.access(ROOT / ".venv/bin/python", os.X_OK)
    outputs = execute(load(tmp_path / "run"), ROOT, timeout=800)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert (tmp_path / "run" / "report.json").exists()
