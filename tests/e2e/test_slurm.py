"""launch/slurm.sbatch under a real Slurm: a controller and two nodes, all on this machine."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny_checkpoints import qwen3_moe, save_byte_tokenizer

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
HAS_SLURM = all(map(shutil.which, PROGRAMS))
CAN_RUN = sys.platform == "linux" and os.geteuid() == 0 and HAS_SLURM

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(not CAN_RUN, reason="needs root, slurm-wlm and munge"),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1 RealMemory=1000
PartitionName=p Nodes=ALL Default=YES State=UP
"""


def free_ports(count):
    """Neighbouring ports that nobody listens at."""
    for first in range(17_001, 30_000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    pytest.fail("no free ports")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which sbatch finds the cluster."""
    folder = Path(tmp_path_factory.mktemp("slurm"))
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(3)))
    environment = os.environ | {
        "SLURM_CONF": str(configuration),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "EXFLOW_MASTER_ADDR": "127.0.0.1",  # the nodes' names mean nothing outside of Slurm
        "GLOO_SOCKET_IFNAME": "lo",
    }
    munge = {"key-file": key.name, "socket": "munge.socket"}
    munge |= {f"{kind}-file": f"munged.{kind}" for kind in ("log", "pid", "seed")}
    options = [f"--{option}={folder / name}" for option, name in munge.items()]
    daemons = [["munged", "--foreground", "--force", *options], ["slurmctld", "-D", "-i"]]
    daemons += [["slurmd", "-D", "-N", f"n{node}"] for node in range(2)]
    started = []
    try:
        for number, daemon in enumerate(daemons):
            log = (folder / f"daemon-{number}.log").open("w")
            started.append(
                subprocess.Popen(
                    daemon, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
            time.sleep(0.5)
        wait_for_nodes(environment, folder)
        yield environment
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def wait_for_nodes(environment, folder):
    deadline, said = time.monotonic() + 60, ""
    while said.split() != ["idle", "idle"]:
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-1500:] for path in folder.glob("daemon-*.log"))
            pytest.fail(f"the nodes are {said!r} after a minute\n{logs}")
        time.sleep(0.5)
        call = ["sinfo", "--noheader", "--Node", "--format=%T"]
        said = subprocess.run(
            call, env=environment, capture_output=True, text=True, check=False
        ).stdout


def submit(slurm, folder, *arguments):
    """Submit and wait; fails with what the job wrote."""
    done = subprocess.run(
        ["sbatch", "--wait", "--job-name", "exflow", *map(str, arguments)],
        cwd=folder,
        env=slurm,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, f"{done.stderr}\n{logs}"


def exflow(*arguments):
    command = [sys.executable, "-m", "exflow", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def test_profile_as_an_array_place_and_decode_on_two_nodes(slurm, tmp_path):
    model = tmp_path / "tiny"
    qwen3_moe(model, vocab_size=256, num_hidden_layers=2, num_experts_per_tok=1)
    save_byte_tokenizer(model)
    for shard in range(2):
        lines = [{"text": f"Text {shard}.{i}", "meta": {"pile_set_name": "T"}} for i in range(8)]
        corpus = tmp_path / f"{shard:02d}.jsonl"
        corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    script = ROOT / "launch/slurm.sbatch"
    profile = ("profile", model, "{shard}.jsonl", "-o", "trace-{shard}.safetensors")
    submit(slurm, tmp_path, "--nodes", 1, "--array", "0-1", script, *profile)

    trace, plan = tmp_path / "trace.safetensors", tmp_path / "plan.json"
    exflow("merge", *sorted(tmp_path.glob("trace-*.safetensors")), "-o", trace)
    exflow("place", trace, "-o", plan, "--nodes", 2, "--ranks-per-node", 1, "--no-compare")

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Prompt {i}"}) + "\n" for i in range(4)))
    options = ("--prompts", prompts, "--max-new-tokens", 4, "--ignore-eos")
    together = ("-o", tmp_path / "two.jsonl", "--metrics", tmp_path / "metrics.json")
    submit(slurm, tmp_path, script, "run", model, "--plan", plan, *options, *together)
    exflow("run", model, *options, "-o", tmp_path / "one.jsonl")
    two, one = (
        {line["id"]: line["token_ids"] for line in map(json.loads, path.read_text().splitlines())}
        for path in (tmp_path / "two.jsonl", tmp_path / "one.jsonl")
    )
    assert two == one
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["measured_equals_predicted"] is True
