"""How the processes of a job find each other: flags, SLURM, TPU pods; and what is said when they do
not.
"""

import http.server
import re
import signal
import subprocess
import sys
import threading

import pytest

from rome.train import distributed
from rome.train.distributed import DistributedError, ProcessLayout, choose
from tests.distributed.processes import ROOT
from tests.processes import reserved_port

SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}


def no_tpu():
    return 1


def test_without_any_sign_this_is_one_process():
    assert choose("", -1, -1, {}, no_tpu).kind == "alone"


def test_flags_win_over_the_environment_and_the_cluster():
    environ = SLURM | {
        "JAX_COORDINATOR_ADDRESS": "other:1",
        "JAX_NUM_PROCESSES": "9",
        "JAX_PROCESS_ID": "8",
    }
    by_flags = ProcessLayout("flags", "by flags", "node-0:1234", 2, 1)
    assert choose("node-0:1234", 2, 1, environ) == by_flags
    by_environment = choose("", -1, -1, environ)
    assert (by_environment.coordinator, by_environment.count, by_environment.index) == (
        "other:1",
        9,
        8,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("node-0:1234", -1, -1),
            "coordinator=node-0:1234 without --num_processes and --process_id",
        ),
        (("", 2, 0), "num_processes=2, process_id=0 without --coordinator"),
        (("node-0", 2, 0), "coordinator='node-0' is no HOST:PORT"),
        (("node-0:1234", 2, 2), "process_id=2 does not fit num_processes=2"),
    ],
)
def test_flags_that_do_not_fit_are_refused_with_the_remedy(arguments, message):
    with pytest.raises(DistributedError, match=re.escape(message)):
        choose(*arguments, {})


def test_a_number_that_is_none_is_refused():
    with pytest.raises(DistributedError, match="num_processes='two' is no number"):
        choose(
            "",
            -1,
            -1,
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
        )


def test_a_slurm_step_of_several_tasks_is_taken_and_a_batch_script_is_not():
    plan = choose("", -1, -1, SLURM)
    assert (plan.kind, plan.count, plan.index, plan.why) == (
        "slurm",
        4,
        2,
        "SLURM step 71.0 of 4 tasks",
    )
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert choose("", -1, -1, batch_script, no_tpu).kind == "alone"


@pytest.mark.parametrize(
    "change, devices",
    [
        (
            {"SLURM_GPUS_ON_NODE": "8"},
            tuple(range(8)),
        ),  # one task a node has all of it: JAX's own rule would leave seven idle
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (0, 1, 2, 3)),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_GPUS_ON_NODE": "8"},
            None,
        ),  # one each: JAX's rule
        (
            {"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "CUDA_VISIBLE_DEVICES": "5"},
            (0,),
        ),  # bound by SLURM: the only one it sees
        ({}, None),
    ],
)
def test_slurm_tasks_take_the_gpus_that_are_theirs(change, devices):
    assert choose("", -1, -1, SLURM | change).local_devices == devices


@pytest.mark.parametrize(
    "environ, workers, kind",
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 1, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1, "alone"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, 1, "tpu"),
        ({}, 16, "tpu"),
        ({}, 1, "alone"),
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}, 16, "alone"),
    ],
)
def test_a_tpu_pod_is_known_by_its_hosts(environ, workers, kind):
    assert choose("", -1, -1, environ, lambda: workers).kind == kind


class Metadata:
    """A metadata server that gives its answers in turn, the last one for ever.

    answers: by attribute: (status, text) each.
    """

    def __init__(self, monkeypatch, **answers):
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                outer.asked.append(name)
                waiting = answers[name.replace("-", "_")]
                status, text = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{self.server.server_port}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing is there
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        monkeypatch.setattr(distributed, "METADATA_WAITS", (0.0, 0.0))
        monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


HOSTS = "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"
SLICES = "ACCELERATOR_TYPE: 'v5p-64'\nMEGASCALE_NUM_SLICES: '2'\nWORKER_ID: '0'\n"
PAGE = "<html><head><title>Bad Gateway: 10,20</title></head></html>"


@pytest.mark.parametrize(
    "hosts, environment, count",
    [
        ([(200, HOSTS)], [(200, SLICES)], 4),
        ([(200, HOSTS + "\n")], [(200, "ZONE: 'a'")], 2),
        ([(200, "0:7:10.0.0.2")], [(200, "ZONE: 'a'")], 1),
        ([(503, "busy"), (200, HOSTS)], [(500, ""), (200, PAGE), (200, SLICES)], 4),
        ([(200, PAGE), (200, ""), (200, HOSTS)], [(200, SLICES)], 4),
    ],
    ids=range(5),
)
def test_a_pod_is_counted_where_its_metadata_fail_for_a_moment(
    monkeypatch, hosts, environment, count
):
    with Metadata(monkeypatch, worker_network_endpoints=hosts, tpu_env=environment):
        assert choose("", -1, -1, {}).kind == ("alone" if count == 1 else "tpu")
        assert distributed._metadata_workers() == count


@pytest.mark.parametrize(
    "answer, reason",
    [
        ((404, "no"), "404"),
        ((503, "busy"), "503"),
        ((200, PAGE), "<html>"),
        ((200, ""), "''"),
        ((200, "a,b"), "'a,b'"),
    ],
    ids=range(5),
)
@pytest.mark.parametrize("broken", ["worker_network_endpoints", "tpu_env"])
def test_a_chip_whose_metadata_cannot_be_read_is_never_alone(monkeypatch, broken, answer, reason):
    answers = {"worker_network_endpoints": [(200, HOSTS)], "tpu_env": [(200, SLICES)]}
    with Metadata(monkeypatch, **answers | {broken: [answer]}) as server:
        with pytest.raises(DistributedError, match=f"3 tries.*{re.escape(reason)}.*--coordinator"):
            choose("", -1, -1, {})
        assert server.asked.count(broken.replace("_", "-")) == 3


def test_a_chip_whose_metadata_server_is_not_there_is_never_alone(monkeypatch):
    with Metadata(monkeypatch):
        pass
    with pytest.raises(DistributedError, match="TPU_SKIP_MDS_QUERY=1"):
        choose("", -1, -1, {})
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert choose("", -1, -1, {}).kind == "alone"


START = """
import sys
from rome.train.distributed import choose, start
start(choose(sys.argv[1], 2, int(sys.argv[2])), stop=lambda: False, errors=(), deadline_seconds=2)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "index, message",
    [
        (1, "no answer from the coordinator"),
        (0, "answers, but not all 2 processes came within 2 s"),
    ],
)
def test_processes_that_do_not_find_each_other_end_in_time_with_one_line(index, message):
    with reserved_port() as port:
        done = subprocess.run(
            [sys.executable, "-c", START, f"127.0.0.1:{port}", str(index)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
    lines = [line for line in done.stderr.splitlines() if line.startswith("launch.train: ")]
    assert (
        done.returncode == 1
        and len(lines) == 1
        and message in lines[0]
        and f"process {index} of 2" in lines[0]
    )
    assert "Check failure" not in done.stderr


STOPPED = """
import signal, sys
from rome.train.distributed import choose, start
made = []
signal.signal(signal.SIGTERM, lambda *_: made.append(1))
print("ready", flush=True)
start(choose(sys.argv[1], 2, 0), stop=lambda: bool(made), errors=())
"""


@pytest.mark.long
def test_a_wish_to_stop_is_heard_while_the_others_are_waited_for():
    with reserved_port() as port:
        process = subprocess.Popen(
            [sys.executable, "-c", STOPPED, f"127.0.0.1:{port}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=150)  # of the 300 s that it would wait
    assert process.returncode == 130 and "stopped before all processes had met" in said, said
