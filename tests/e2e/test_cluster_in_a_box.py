"""The cluster in a box as people start it: shaped links, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOX = [sys.executable, "-m", "launch.cluster_in_a_box"]
CAN_RUN = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("tc") is not None

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not CAN_RUN, reason="needs root, and ip and tc of iproute2"),
]

# Node 0 takes what the other nodes send it, and says how long that took.
TRANSFER = """
import os, socket, sys, time
size, senders = int(sys.argv[1]), int(os.environ["NNODES"]) - 1
if os.environ["NODE_RANK"] == "0":
    server = socket.create_server((os.environ["MASTER_ADDR"], 5000))
    peers = [server.accept()[0] for _ in range(senders)]
    start, got = time.monotonic(), 0
    for peer in peers:
        while part := peer.recv(1 << 20):
            got += len(part)
    print(got, time.monotonic() - start)
else:
    for _ in range(100):
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 5000))
            break
        except OSError:
            time.sleep(0.05)
    peer.sendall(bytes(size))
"""

HANDSHAKE = """
import os, socket, time
if os.environ["NODE_RANK"] == "0":
    server = socket.create_server((os.environ["MASTER_ADDR"], 5000))
    server.accept(), server.accept()
else:
    time.sleep(0.5)
    socket.create_connection((os.environ["MASTER_ADDR"], 5000))
    start = time.monotonic()
    socket.create_connection((os.environ["MASTER_ADDR"], 5000))
    print(time.monotonic() - start)
"""


def box(*arguments, **options):
    return subprocess.run(
        [*BOX, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


def transfer(tmp_path, size, *shape):
    script = tmp_path / "transfer.py"
    script.write_text(TRANSFER)
    done = box("run", "--json", "--per-node", *shape, "--", sys.executable, script, size)
    assert done.returncode == 0, done.stderr
    got, seconds = done.stderr.split()
    return json.loads(done.stdout), int(got), float(seconds)


def host_network():
    """All links of the host, without counters, and all named namespaces."""
    calls = (["ip", "-j", "link"], ["ip", "-j", "addr"], ["ip", "netns", "list"])
    return [
        subprocess.run(call, capture_output=True, text=True, check=True).stdout for call in calls
    ]


@pytest.fixture(autouse=True)
def host_is_as_it_was():
    before = host_network()
    yield
    assert host_network() == before


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def start_sleeping(name, tmp_path):
    """A run whose nodes have begun to sleep, and the process ids of these."""
    script = tmp_path / "sleep.sh"
    script.write_text(f'echo $$ > "{tmp_path}/pid-$NODE_RANK"; sleep 100\n')
    process = subprocess.Popen(
        [*BOX, "run", "--name", name, "--per-node", "--", "sh", str(script)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    files = [tmp_path / f"pid-{node}" for node in range(2)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return process, [int(file.read_text()) for file in files]


def with_tc(tmp_path, body):
    """An environment where tc is a script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "tc").write_text(f"#!/bin/sh\n{body}\n")
    (programs / "tc").chmod(0o755)
    return os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}


def is_alive(pid):
    return Path(f"/proc/{pid}").exists()


def test_a_link_carries_what_its_rate_says_and_the_interface_counts_it(tmp_path):
    size = 4_000_000
    result, got, seconds = transfer(tmp_path, size, "--nodes", 2, "--rate", "40mbit")
    assert got == size
    sent = result["interfaces"]["n1"]["sent_bytes"]
    assert size < sent < 1.06 * size
    assert result["interfaces"]["n0"]["received_bytes"] == pytest.approx(sent, rel=0.01)
    # 0.8 s by the rate, less the bucket's first 256 kB; a machine with other work takes longer.
    assert 0.7 < seconds < 8


def test_an_unshaped_link_is_faster(tmp_path):
    _, _, shaped = transfer(tmp_path, 4_000_000, "--rate", "40mbit")
    _, _, free = transfer(tmp_path, 4_000_000)
    assert free < shaped / 3


def test_a_trunk_is_slower_than_the_racks_and_counted_apart(tmp_path):
    shape = ("--nodes", 2, "--racks", 2, "--rate", "400mbit", "--trunk-rate", "40mbit")
    result, _, seconds = transfer(tmp_path, 4_000_000, *shape)
    assert seconds > 0.7
    assert 4_000_000 < result["interfaces"]["trunk1"]["sent_bytes"] < 1.06 * 4_000_000


def test_delay_holds_packets_up(tmp_path):
    script = tmp_path / "handshake.py"
    script.write_text(HANDSHAKE)
    done = box("run", "--json", "--per-node", "--delay-ms", 40, "--", sys.executable, script)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) > 0.08  # there and back
    assert json.loads(done.stdout)["delay_ms"] == 40


def test_up_and_down_leave_nothing_and_run_uses_what_is_up(tmp_path):
    assert box("up", "--name", "standing", "--nodes", 3).returncode == 0
    try:
        again = box("up", "--name", "standing")
        assert again.returncode == 2
        assert "is up already" in again.stderr
        other = box("run", "--name", "standing", "--nodes", 2, "--per-node", "--", "true")
        assert "another shape" in other.stderr
        done = box("run", "--name", "standing", "--per-node", "--json", "--", "true")
        assert json.loads(done.stdout)["nodes"] == 3
    finally:
        assert box("down", "--name", "standing").returncode == 0
    missing = box("down", "--name", "standing")
    assert missing.returncode == 2
    assert "no cluster 'standing' is up" in missing.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_ranks_and_removes_the_cluster(number, tmp_path):
    process, pids = start_sleeping("signalled", tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "taken down" in said
    assert not any(map(is_alive, pids))


def test_what_a_killed_run_left_is_removed_by_the_next_command(tmp_path):
    process, pids = start_sleeping("killed", tmp_path)
    process.kill()
    process.wait()
    process.stderr.close()
    assert "killed-n0" in host_network()[2]
    assert box("run", "--per-node", "--", "true").returncode == 0
    wait_for(lambda: not any(map(is_alive, pids)))


def test_ranks_of_a_killed_run_in_a_cluster_that_stays_are_ended_and_no_others(tmp_path):
    assert box("up", "--name", "kept").returncode == 0
    try:
        killed, pids = start_sleeping("kept", tmp_path)
        (tmp_path / "other").mkdir()
        lives, others = start_sleeping("kept", tmp_path / "other")
        killed.kill()
        killed.wait()
        killed.stderr.close()
        assert all(map(is_alive, pids))
        assert box("run", "--name", "kept", "--per-node", "--", "true").returncode == 0
        wait_for(lambda: not any(map(is_alive, pids)))
        assert all(map(is_alive, others))
        lives.terminate()
        lives.communicate(timeout=30)
    finally:
        assert box("down", "--name", "kept").returncode == 0


def test_a_cluster_whose_making_was_killed_is_not_up(tmp_path):
    killer = with_tc(tmp_path, "kill -9 $PPID")
    assert box("up", "--name", "half", "--rate", "1mbit", env=killer).returncode == -signal.SIGKILL
    assert "half-n0" in host_network()[2]
    down = box("down", "--name", "half")
    assert down.returncode == 2
    assert "no cluster 'half' is up" in down.stderr


def test_a_failing_node_gives_its_exit_code_and_a_timeout_124():
    assert box("run", "--per-node", "--", "sh", "-c", "exit 3").returncode == 3
    late = box("run", "--per-node", "--timeout", "0.5", "--", "sleep", "100")
    assert late.returncode == 124


def test_a_crash_while_it_is_being_built_leaves_nothing(tmp_path):
    environment = with_tc(tmp_path, "echo no such qdisc >&2; exit 2")
    done = box("run", "--rate", "1mbit", "--per-node", "--", "true", env=environment)
    assert done.returncode == 2
    assert "no such qdisc" in done.stderr


def test_a_program_that_does_not_exist_is_one_line():
    done = box("run", "--", "no-such-program")
    assert done.returncode == 2
    assert "no program that can be found" in done.stderr


@pytest.mark.slow
def test_ranks_of_torchrun_meet_over_the_links(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, time, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor([dist.get_rank()])\n"
        "dist.all_reduce(total)\n"
        "os.write(1, f'{dist.get_world_size()} {int(total)}\\n'.encode())\n"
        # torchrun's store lives in node 0's agent: the other agent must get to its exit barrier
        "time.sleep(3 if dist.get_rank() < 2 else 0)\n"
    )
    done = box("run", "--nodes", 2, "--ranks-per-node", 2, "--", "python", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4 6"] * 4
