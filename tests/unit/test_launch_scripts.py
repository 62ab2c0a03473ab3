"""torchrun.sh, slurm.sbatch and lws.yaml, with torchrun, srun and scontrol faked."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden/slurm_launch.txt"
SLURM = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "8",
}
# srun notes how it was called, then starts the task of each node, as Slurm would.
FAKES = {
    "torchrun": 'printf "%s" torchrun >>"$LOG"; printf " %q" "$@" >>"$LOG"; echo >>"$LOG"',
    "scontrol": 'test "$*" = "show hostnames gpu[07-08]" && printf "gpu07\\ngpu08\\n"',
    "srun": """
printf "%s" srun >>"$LOG"; printf " %q" "$@" >>"$LOG"; echo >>"$LOG"
while [ "$1" != bash ]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@"; done
""",
    "nvidia-smi": "printf 'GPU 0: fake\\nGPU 1: fake\\nGPU 2: fake\\n'",
}


@pytest.fixture
def call(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    log = tmp_path / "log"

    def run(script, *arguments, without=(), **variables):
        for name in without:
            (programs / name).unlink()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "EXFLOW"))}
        clean |= {"PATH": f"{programs}:/usr/bin:/bin", "LOG": str(log)}
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / script), *arguments],
            cwd=tmp_path,
            env=clean | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, log.read_text() if log.exists() else ""

    return run


def test_slurm_starts_one_torchrun_a_node_as_the_committed_lines_say(call):
    prompts = "prompts of today.jsonl"
    done, log = call("slurm.sbatch", "run", "MODEL", "--prompts", prompts, "-o", "out", **SLURM)
    assert done.returncode == 0, done.stderr
    assert log == GOLDEN.read_text()


def test_a_task_of_an_array_reads_its_own_shard(call):
    shard = {"SLURM_ARRAY_TASK_ID": "7", "EXFLOW_RANKS": "1"}
    arguments = ("profile", "MODEL", "pile/{shard}.jsonl.zst", "-o", "trace-{shard}")
    _, log = call("slurm.sbatch", *arguments, **SLURM, **shard)
    assert log.splitlines()[-1].endswith("profile MODEL pile/07.jsonl.zst -o trace-07")
    assert "--nproc-per-node 1 " in log


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), SLURM, "say what exflow shall do"),
        (("run",), {}, "start it with sbatch"),
        (("run",), SLURM | {"SLURM_JOB_NUM_NODES": ""}, "start it with sbatch"),
        (("run",), SLURM | {"SLURM_JOB_NODELIST": ""}, "start it with sbatch"),
        (("run",), SLURM | {"EXFLOW_ENVIRONMENT": "nowhere"}, "set EXFLOW_ENVIRONMENT"),
        (("run",), SLURM | {"EXFLOW_RANKS": "x"}, "a number of ranks from 1, got 'x'"),
        (("run",), SLURM | {"EXFLOW_RANKS": "-1"}, "a number of ranks from 1, got '-1'"),
    ],
)
def test_slurm_says_what_is_missing(call, arguments, variables, message):
    done, log = call("slurm.sbatch", *arguments, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert not log


def test_a_node_without_gpus_gets_one_rank(call):
    done, log = call("slurm.sbatch", "run", **SLURM | {"SLURM_GPUS_ON_NODE": "0"})
    assert done.returncode == 0, done.stderr
    assert "--nproc-per-node 1 " in log


def test_one_machine_gets_a_rank_for_each_gpu(call):
    done, log = call("torchrun.sh", "run", "MODEL", OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    assert log == "torchrun --standalone --nproc-per-node 3 -m exflow run MODEL\n"


def test_without_gpus_two_ranks_or_as_many_as_asked(call):
    _, log = call("torchrun.sh", "run", without=["nvidia-smi"])
    assert "--nproc-per-node 2 " in log
    _, log = call("torchrun.sh", "run", EXFLOW_RANKS="5")
    assert "--nproc-per-node 5 " in log.splitlines()[-1]


@pytest.mark.parametrize("ranks", ["x", "-1", "0", "1.5"])
def test_ranks_that_are_no_number_are_refused(call, ranks):
    done, log = call("torchrun.sh", "run", EXFLOW_RANKS=ranks)
    assert (done.returncode, log) == (2, "")
    assert done.stderr == f"error: EXFLOW_RANKS must be a number of ranks from 1, got '{ranks}'\n"


def test_without_torchrun_it_says_so(call):
    done, _ = call("torchrun.sh", "run", without=["torchrun"])
    assert done.returncode == 2
    assert "activate the environment" in done.stderr


def test_kubernetes_starts_as_many_ranks_as_it_reserves_gpus_for():
    manifest = yaml.safe_load((ROOT / "launch/lws.yaml").read_text())
    assert manifest["kind"] == "LeaderWorkerSet"
    pod = manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["EXFLOW_RANKS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_runs_a_command_that_torchrun_and_exflow_understand(call, tmp_path):
    manifest = yaml.safe_load((ROOT / "launch/lws.yaml").read_text())
    (container,) = manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"]
    script = tmp_path / "pod.sh"
    script.write_text(container["command"][2].replace("sleep infinity", "true"))
    pod = {"LWS_LEADER_ADDRESS": "exflow-0", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
    done, log = call(script, MODEL="some/model", EXFLOW_RANKS="8", **pod)
    assert done.returncode == 0, done.stderr
    assert log.startswith(
        "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr exflow-0 "
        "--master-port 29500 -m exflow run some/model --plan /data/plan.json "
    )
