"""Who gets which device: the decision, and the environment that each process really has."""

import json
import subprocess
import sys

import pytest

from rome.stages.config import load_config
from rome.train.devices import (
    FRACTIONS,
    Machine,
    divide,
    divide_for,
    find_machine,
)
from tests.paths import ROOT

CPU = Machine("cpu")
PYTHON_FRACTION, FRACTION = FRACTIONS


def gpus(count):
    return Machine("gpu", tuple(map(str, range(count))), "gpu")


def tpus(count):
    return Machine("tpu", tuple(map(str, range(count))), "v5e")


def short(variables):
    """The variables that divide devices, without their long names."""
    names = {
        "CUDA_VISIBLE_DEVICES": "gpu",
        "TPU_VISIBLE_CHIPS": "tpu",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "bounds",
        PYTHON_FRACTION: "memory",
        "JAX_PLATFORMS": "on",
    }
    return {
        short: variables[name] for name, short in names.items() if variables.get(name) is not None
    }


ON_CPU = {"on": "cpu"}
ALL = {"memory": "0.92"}
INSIDE = "inside"
SHARE = {"gpu": "0", "memory": "0.35"}
# machine, config.engine.device, engines, mesh -> trainer, engines
TABLE = [
    (CPU, "auto", 1, 1, {}, [{}]),
    (CPU, "auto", 2, 1, {}, [{}, {}]),
    (CPU, "share", 1, -1, {}, [{}]),
    (CPU, "inside", 1, 1, {}, INSIDE),
    (gpus(1), "auto", 0, 1, ALL, []),
    (gpus(1), "auto", 1, 1, ALL, INSIDE),
    (gpus(1), "auto", 1, -1, ALL, INSIDE),
    (gpus(1), "inside", 1, 1, ALL, INSIDE),
    (gpus(1), "share", 1, 1, {"memory": "0.55"}, [SHARE]),
    (gpus(1), "auto", 2, 1, {"memory": "0.55"}, 2 * [{"gpu": "0", "memory": "0.175"}]),
    (gpus(1), "cpu", 1, 1, ALL, [ON_CPU]),
    (gpus(2), "auto", 1, 1, ALL | {"gpu": "0"}, [{"gpu": "1", "memory": "0.9"}]),
    (gpus(2), "inside", 1, 1, ALL, INSIDE),
    (gpus(2), "auto", 1, 2, ALL, INSIDE),
    (gpus(2), "share", 1, 2, {"memory": "0.55"}, [SHARE]),
    (gpus(2), "share", 1, 1, {"memory": "0.55"}, [SHARE]),
    (gpus(8), "auto", 1, -1, ALL | {"gpu": "0,1,2,3"}, [{"gpu": "4", "memory": "0.9"}]),
    (
        gpus(4),
        "auto",
        2,
        2,
        ALL | {"gpu": "0,1"},
        [{"gpu": "2", "memory": "0.9"}, {"gpu": "3", "memory": "0.9"}],
    ),
    (tpus(1), "auto", 1, 1, {}, INSIDE),
    (tpus(1), "inside", 1, 1, {}, INSIDE),
    (tpus(1), "auto", 2, 1, {}, [ON_CPU, ON_CPU]),
    (tpus(1), "cpu", 1, 1, {}, [ON_CPU]),
    (
        tpus(4),
        "auto",
        1,
        1,
        {"tpu": "0", "bounds": "1,1,1"},
        [{"tpu": "1", "bounds": "1,1,1"}],
    ),
    (
        tpus(4),
        "auto",
        2,
        -1,
        {"tpu": "0,1", "bounds": "1,2,1"},
        [{"tpu": "2", "bounds": "1,1,1"}, {"tpu": "3", "bounds": "1,1,1"}],
    ),
    (tpus(4), "auto", 1, 4, {}, INSIDE),
    (tpus(4), "auto", 1, 3, {}, INSIDE),  # no process can have three chips
    (
        tpus(8),
        "auto",
        1,
        -1,
        {"tpu": "0,1,2,3", "bounds": "2,2,1"},
        [{"tpu": "4", "bounds": "1,1,1"}],
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=map(str, range(len(TABLE))))
def test_the_decision(row):
    machine, device, num_engines, mesh, trainer, engines = row
    division = divide(machine, device, num_engines, mesh)
    assert short(division.trainer) == trainer
    assert division.is_inside == (engines == INSIDE)
    if division.is_inside:
        assert division.engines == () and division.engine_platform == machine.platform
        return
    assert [short(variables) for variables in division.engines] == engines
    for variables in division.engines:
        assert "XLA_FLAGS" not in variables and "LIBTPU_INIT_ARGS" not in variables
    on_cpu = ON_CPU in engines
    assert division.engine_platform == ("cpu" if on_cpu else machine.platform)
    assert ("engine runs on the CPU" in division.says) == on_cpu


SHARES = "trainer and embedded engine share the GPU, as two processes: 55% and 35% of its memory"
# machine, config.engine.device -> what `launch.doctor` and a run say, for a mesh of one device
SAYS = [
    (CPU, "auto", "trainer and embedded engine run on the CPU, each in a process of its own"),
    (CPU, "inside", "the trainer has the CPU; the engine runs inside it, in turn with the updates"),
    (gpus(1), "auto", "the trainer has the GPU; the engine runs inside it, in turn with the"),
    (gpus(1), "share", SHARES),
    (gpus(1), "cpu", "the engine runs on the CPU, as config.engine.device=cpu says"),
    (gpus(4), "auto", "the trainer has GPU 0, the embedded engine GPU 1: the mesh leaves it a"),
    (gpus(4), "share", SHARES),
    (
        gpus(4),
        "inside",
        "has all 4 GPUs; the engine runs inside it, on the mesh's expert and tensor",
    ),
    (tpus(1), "auto", "the trainer has the TPU; the engine runs inside it, in turn with the"),
    (tpus(1), "cpu", "the engine runs on the CPU, as config.engine.device=cpu says"),
    (tpus(4), "auto", "the trainer has TPU 0, the embedded engine TPU 1: the mesh leaves it a"),
    (
        tpus(4),
        "inside",
        "has all 4 TPUs; the engine runs inside it, on the mesh's expert and tensor",
    ),
]


@pytest.mark.parametrize("row", SAYS, ids=map(str, range(len(SAYS))))
def test_what_this_machine_will_use_is_said_with_the_reason(row):
    machine, device, says = row
    found = divide(machine, device, 1, 1).says
    assert says.replace("the engine runs on", "the embedded engine runs on") in found


def refusal_of(machine, device, num_engines, is_alone):
    if (device, machine.platform) == ("share", "tpu"):
        return r"engine.device=share: .* Set it to auto"
    if device == "inside" and num_engines > 1:
        return rf"engine.count={num_engines}\. Set it to 1"
    if device == "inside" and not is_alone:
        return "needs a trainer of one process"
    return ""


@pytest.mark.parametrize("machine", [CPU, gpus(1), gpus(2), gpus(8), tpus(1), tpus(4), tpus(8)])
@pytest.mark.parametrize("device", ["auto", "cpu", "share", "inside"])
@pytest.mark.parametrize("is_alone", [True, False])
def test_no_device_is_claimed_twice(machine, device, is_alone):
    """Chips: of one process each, unless their memory is divided into shares that add up."""
    for num_engines in (1, 2, 3):
        for mesh in (-1, 1, 2, 8):
            refusal = refusal_of(machine, device, num_engines, is_alone)
            if refusal:
                with pytest.raises(ValueError, match=refusal):
                    divide(machine, device, num_engines, mesh, is_alone=is_alone)
                continue
            division = divide(machine, device, num_engines, mesh, is_alone=is_alone)
            used = dict.fromkeys(machine.chips, 0.0)
            for variables in (division.trainer, *division.engines):
                if variables.get("JAX_PLATFORMS") == "cpu":
                    continue
                names = variables.get("CUDA_VISIBLE_DEVICES") or variables.get("TPU_VISIBLE_CHIPS")
                share = float(variables.get(PYTHON_FRACTION) or 1.0)
                for chip in names.split(",") if names else machine.chips:
                    used[chip] += share
            assert max(used.values(), default=0.0) <= 1.0
            has_one = len(division.engines) == num_engines
            assert division.is_inside != has_one


def test_engines_of_a_job_of_several_processes_take_nothing_from_the_mesh():
    assert divide(gpus(8), "auto", 1, 1, is_alone=False).engine_platform == "cpu"
    assert divide(tpus(4), "auto", 1, 1, is_alone=False).engine_platform == "cpu"
    shared = divide(gpus(8), "share", 1, -1, is_alone=False)
    assert short(shared.engines[0]) == {"gpu": "0", "memory": "0.35"}


@pytest.mark.parametrize("name", FRACTIONS)
def test_the_users_memory_fraction_is_kept_and_the_engine_gets_of_the_rest(name):
    division = divide(gpus(1), "share", 1, 1, given={name: "0.7"})
    assert not set(FRACTIONS) & set(division.trainer)
    # JAX refuses both names together: the engine inherits neither.
    assert division.engines[0][PYTHON_FRACTION] == "0.2" and division.engines[0][FRACTION] is None
    with pytest.raises(ValueError, match=f"{name}=0.92 leaves an embedded engine 0% of a GPU"):
        divide(gpus(1), "share", 1, 1, given={name: "0.92"})
    assert not set(FRACTIONS) & set(divide(gpus(1), "auto", 1, 1, given={name: "0.92"}).trainer)
    assert divide(gpus(1), "cpu", 1, 1, given={name: "0.92"}).engine_platform == "cpu"


def test_too_many_engines_for_one_gpu_are_refused():
    with pytest.raises(ValueError, match=r"engine.count=8 leaves an embedded engine 4% of a GPU"):
        divide(gpus(1), "auto", 8, 1)


def test_the_config_says_how_many_engines_and_which_mesh():
    config = load_config("experiments/ipa.py", "tiny")
    assert divide_for(config, gpus(1), True, {}).is_inside
    config.engine.device = "share"
    assert "share the GPU" in divide_for(config, gpus(1), True, {}).says
    config.engine.device = "inside"
    config.engine.urls = "http://a:1"
    assert divide_for(config, gpus(1), True, {}).engines == ()
    assert not divide_for(config, gpus(1), True, {}).is_inside
    config.engine.urls = ""
    config.engine.device = "auto"
    config.engine.count = 2
    config.mesh.fsdp = 2
    assert divide_for(config, gpus(4), True, {}).trainer["CUDA_VISIBLE_DEVICES"] == "0,1"
    config.mesh.tensor = -1
    assert divide_for(config, gpus(3), True, {}).trainer["CUDA_VISIBLE_DEVICES"] == "0"
    text = load_config("experiments/cpt.py", "tiny")
    assert divide_for(text, tpus(1), True, {}).says == "the trainer has the TPU"


@pytest.mark.parametrize(
    "environ, backend, machine",
    [
        ({}, True, Machine("gpu", ("0", "1"), "gpu")),
        ({"CUDA_VISIBLE_DEVICES": "1"}, True, Machine("gpu", ("1",), "gpu")),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, True, Machine("gpu", ("GPU-a", "GPU-b"), "gpu")),
        ({"CUDA_VISIBLE_DEVICES": ""}, True, CPU),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True, CPU),
        ({"JAX_PLATFORMS": "cpu"}, True, CPU),
        ({"JAX_PLATFORMS": "cuda,cpu"}, True, Machine("gpu", ("0", "1"), "gpu")),
        ({}, False, CPU),
    ],
)
def test_the_machine_is_what_jax_will_see_of_it(tmp_path, environ, backend, machine):
    (tmp_path / "pci" / "a").mkdir(parents=True)
    (tmp_path / "pci" / "a" / "vendor").write_text("0x10de")
    (tmp_path / "dev").mkdir()
    for node in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / node).touch()
    found = find_machine(
        environ,
        devices=str(tmp_path / "pci"),
        nodes=str(tmp_path / "dev"),
        has_backend={"gpu": backend, "tpu": False},
    )
    assert found == machine


MINE = "--xla_cpu_enable_fast_math=false"  # a flag of the user
TRAINER = """
import json, os, sys
from rome.train.devices import Machine, claim_devices, engines_division
config = {"engine": {"urls": "", "count": 1, "device": "share"}, "mesh": {"fsdp": 1}}
claim_devices(config, True, machine=Machine(*json.loads(sys.argv[1])))
mine = dict(os.environ)
import jax
from rome.engine.errors import EngineError
from rome.engine.process import start_server
assert len(jax.devices()) == 3  # jaxlib ends the process at a flag that it does not know
theirs = []
for backend in ("gpu", "cpu"):
    # The interpreter of this engine prints its environment and ends.
    sys.executable, log = sys.argv[2], f"{sys.argv[3]}/{backend}.log"
    division = engines_division(backend, "share", 1)
    try:
        start_server("model", log, environment=division.engines[0])
    except EngineError:
        lines = open(log).read().splitlines()
        theirs.append(dict(line.split("=", 1) for line in lines if "=" in line))
print(json.dumps([mine, *theirs]))
"""


@pytest.mark.long
def test_each_process_really_gets_the_environment_of_its_part(tmp_path):
    """Of one GPU: a process that claims it as launch.train does, and the engine that it starts."""
    printer = tmp_path / "python"
    printer.write_text("#!/bin/sh\nenv\nexit 3\n")
    printer.chmod(0o755)
    machine = json.dumps(["gpu", ["0"], "gpu"])
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, machine, str(printer), str(tmp_path)],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=3 {MINE}",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    trainer, engine, _ = json.loads(done.stdout.splitlines()[-1])
    assert trainer[PYTHON_FRACTION] == "0.55" and engine[PYTHON_FRACTION] == "0.35"
    assert engine["CUDA_VISIBLE_DEVICES"] == "0"
    assert "--xla_gpu" in trainer["XLA_FLAGS"] and "NCCL_BUFFSIZE" in trainer
    assert engine["XLA_FLAGS"] == MINE
    assert "NCCL_BUFFSIZE" not in engine


def test_an_accelerator_that_was_not_divided_is_left_to_the_process_that_holds_it():
    from rome.train import devices

    assert devices._claim.division is None  # of this process
    division = devices.engines_division("gpu", "auto", 2)
    assert [short(variables) for variables in division.engines] == [ON_CPU, ON_CPU]
    assert "since the gpu was not divided" in division.says
    assert devices.engines_division("cpu", "auto", 2).engines == ({}, {})


def test_an_engine_inside_a_process_that_divided_nothing_runs_on_its_device():
    from rome.train import devices

    for backend in ("cpu", "gpu", "tpu"):
        division = devices.engines_division(backend, "inside", 1)
        assert division.is_inside and division.engine_platform == backend
    assert not devices.engines_division("cpu", "inside", 0).is_inside  # engines have URLs
    with pytest.raises(ValueError, match=r"engine.count=2\. Set it to 1"):
        devices.engines_division("cpu", "inside", 2)
    with pytest.raises(ValueError, match="needs a trainer of one process"):
        devices.engines_division("cpu", "inside", 1, is_alone=False)
