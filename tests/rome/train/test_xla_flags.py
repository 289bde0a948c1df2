"""Compiler flags by chip: the user's win, and nothing is set on a CPU. That jaxlib knows every GPU
flag is shown beside, in test_devices.py.
"""

import pytest

from rome.train.xla_flags import (
    LIBTPU_ARGS,
    environment_of,
    find_chips,
    merge,
)


def test_flags_of_the_user_win_one_by_one():
    merged = merge("--b=mine --c", {"--a": "1", "--b": "2", "--c": "3"})
    assert merged == "--b=mine --c --a=1"
    assert merge(merged, {"--a": "1", "--b": "2", "--c": "3"}) == merged


@pytest.mark.parametrize("chip", LIBTPU_ARGS)
def test_a_tpu_gets_its_flags_through_libtpu_and_keeps_xla_flags(chip):
    ((name, value),) = environment_of(
        chip, {"XLA_FLAGS": "--mine=1", "LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=7"}
    ).items()
    assert (
        name == "LIBTPU_INIT_ARGS"
        and value.split()[0] == "--xla_tpu_scoped_vmem_limit_kib=7"
        and value.count("scoped_vmem") == 1
    )
    assert set(flag.split("=")[0] for flag in value.split()) >= set(LIBTPU_ARGS[chip])


def test_a_gpu_gets_xla_flags_and_what_the_user_left_open():
    variables = environment_of(
        "gpu", {"NCCL_BUFFSIZE": "1", "XLA_FLAGS": "--xla_gpu_triton_gemm_any=false"}
    )
    assert "NCCL_BUFFSIZE" not in variables and "XLA_PYTHON_CLIENT_MEM_FRACTION" in variables
    assert (
        variables["XLA_FLAGS"].startswith("--xla_gpu_triton_gemm_any=false ")
        and variables["XLA_FLAGS"].count("triton") == 1
    )


def test_a_memory_fraction_by_its_newer_name_is_not_joined_by_the_older_one():
    """JAX refuses both together."""
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment_of(
        "gpu", {"XLA_CLIENT_MEM_FRACTION": "0.5"}
    )


def test_on_a_cpu_nothing_is_set():
    assert environment_of(None, {}) == {}


@pytest.mark.parametrize(
    "vendor, device, node, chip",
    [
        ("0x1ae0", "0x0062", "accel0", ("v5p", 2)),
        ("0x1ae0", "0x006f", "vfio", ("v6e", 2)),
        ("0x1ae0", "0x0042", "nvme0", (None, 0)),  # Google's disks are no TPU
        ("0x10de", "0x2330", "nvidia0", ("gpu", 1)),
        ("0x10de", "0x2330", "null", (None, 0)),  # a GPU without a driver is none
    ],
)
def test_the_chips_are_read_from_the_bus(tmp_path, vendor, device, node, chip):
    for place in ("0000:00:05.0", "0000:00:06.0"):
        (tmp_path / "pci" / place).mkdir(parents=True)
        (tmp_path / "pci" / place / "vendor").write_text(vendor + "\n")
        (tmp_path / "pci" / place / "device").write_text(device + "\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / node).touch()
    assert find_chips(str(tmp_path / "pci"), str(tmp_path / "dev")) == chip
