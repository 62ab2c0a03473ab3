"""A rank that dies or hangs in the middle of decode: the others end in time, and nothing is lost."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest

from exflow.runtime.completions import CompletionFile
from launch.cluster_in_a_box import network
from launch.cluster_in_a_box.cluster import Cluster
from strikes import IN_TIME, Site, by_id, finish, interrupt, make_folder, make_job

pytestmark = pytest.mark.distributed

CAN_BOX = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("tc") is not None
THREE = Site(num_ranks=3)
STRIKES = int(os.environ.get("EXFLOW_DRILL_STRIKES", "5"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("failures"), 24)


@pytest.fixture(scope="module")
def expected(folder):
    job = make_job(folder, folder / "whole.jsonl")
    finish(THREE, job, folder)
    return by_id(job.output)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_in_time_and_a_new_start_goes_on(folder, expected, tmp_path, how):
    rng = random.Random(int(how))
    job = make_job(folder, tmp_path / "out.jsonl")
    for victim in (1, 0):
        took, said = interrupt(
            THREE,
            job,
            folder,
            strike=lambda ranks, v=victim: os.kill(ranks[v].pid, how),
            struck=(victim,),
            moment=(rng.randrange(1, 8), 0.0),
        )
        assert took < IN_TIME
        assert len(said) == THREE.num_ranks - 1
        for message in said.values():
            assert "RankFailureError" in message
            assert f"rank {victim} was killed or hangs" in message
            assert "decode step" in message or "prefill step" in message
        assert expected.items() >= by_id(job.output).items()
    finish(THREE, job, folder)
    assert by_id(job.output) == expected


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not CAN_BOX, reason="needs root, and ip and tc of iproute2")
def test_strikes_at_random_moments_lose_no_request_and_double_none(tmp_path):
    folder = make_folder(tmp_path, 12 * STRIKES)
    job, whole = (
        make_job(folder, tmp_path / "out.jsonl"),
        make_job(folder, tmp_path / "whole.jsonl"),
    )
    cluster = Cluster(name="drill", nodes=2, ranks_per_node=2, rate="100mbit")
    site = Site(
        num_ranks=4,
        namespaces=tuple(cluster.namespace(rank // 2) for rank in range(4)),
        environment={"MASTER_ADDR": cluster.address(0), "GLOO_SOCKET_IFNAME": "eth0"},
    )
    rng = random.Random(20)
    with network.built(cluster):
        finish(site, whole, folder)
        expected = by_id(whole.output)
        for number in range(STRIKES):
            how = (signal.SIGKILL, signal.SIGSTOP, "link down")[number % 3]
            victim = rng.randrange(4)
            moment = (rng.randrange(1, 4), rng.uniform(0, 0.1))
            took, said = strike_at(site, job, folder, how, victim, moment)
            assert took < IN_TIME, (number, said)
            assert expected.items() >= by_id(job.output).items()
        finish(site, job, folder)
        assert by_id(job.output) == expected


def strike_at(site, job, folder, how, victim, moment):
    """One strike; every rank that is left must name a rank it lost, and the step."""
    if how == "link down":
        struck, node = (), site.namespaces[victim]
        took, said = interrupt(
            site, job, folder, strike=lambda _: set_link(node, "down"), struck=struck, moment=moment
        )
        set_link(node, "up")
    else:
        struck = (victim,)
        took, said = interrupt(
            site,
            job,
            folder,
            strike=lambda ranks: os.kill(ranks[victim].pid, how),
            struck=struck,
            moment=moment,
        )
    for rank, message in said.items():
        lost = re.search(r"rank (\d) was killed or hangs", message)
        assert lost, message
        assert re.search(r"noticed at (decode|prefill) step", message), message
        if struck:
            assert int(lost[1]) == victim, message
        else:
            assert int(lost[1]) // 2 != rank // 2, message
    return took, said


def set_link(namespace, state):
    subprocess.run(["ip", "-n", namespace, "link", "set", "eth0", state], check=True)


def test_two_runs_do_not_write_the_same_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with CompletionFile(path), pytest.raises(ValueError, match="another run is writing it"):
        CompletionFile(path)
    with CompletionFile(path) as again:
        assert again.finished == set()
