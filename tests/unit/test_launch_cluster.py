"""The cluster in a box: what it would build, and what it refuses. No root needed."""

import sys

import pytest

from launch.cluster_in_a_box import __main__, launcher, network
from launch.cluster_in_a_box.cluster import Cluster, bits_per_second, up_commands
from launch.cluster_in_a_box.errors import BoxError

BUCKET = "root tbf rate {} burst {} latency 100ms"


def lines(cluster):
    return [" ".join(command) for command in up_commands(cluster)]


def test_both_ends_of_every_cable_are_shaped():
    buckets = [line for line in lines(Cluster(nodes=2, rate="100mbit")) if " tbf " in line]
    expected = [
        ("box-n0", "eth0"),
        ("box-sw", "p0"),
        ("box-n1", "eth0"),
        ("box-sw", "p1"),
    ]
    bucket = BUCKET.format("100mbit", "256kb")
    assert buckets == [f"tc -n {ns} qdisc add dev {dev} {bucket}" for ns, dev in expected]


def test_fast_links_get_a_larger_bucket_and_unlimited_ones_none():
    assert BUCKET.format("1gbit", "512kb") in "\n".join(lines(Cluster(rate="1gbit")))
    assert BUCKET.format("1gbit", "64kb") in "\n".join(lines(Cluster(rate="1gbit", burst="64kb")))
    assert not [line for line in lines(Cluster()) if line.startswith("tc")]


def test_every_device_is_made_inside_a_namespace():
    cluster = Cluster(nodes=4, racks=2, rate="1gbit", trunk_rate="100mbit", delay_ms=1.0)
    outside = [
        line for line in lines(cluster) if not line.startswith(("ip -n ", "tc -n ", "ip netns "))
    ]
    assert not outside


def test_racks_take_the_nodes_in_order_and_meet_at_shaped_trunks():
    cluster = Cluster(nodes=4, racks=2, rate="1gbit", trunk_rate="100mbit")
    assert [cluster.rack(node) for node in range(4)] == [0, 0, 1, 1]
    trunks = [line.split(" root ")[0] for line in lines(cluster) if "rate 100mbit" in line]
    assert trunks == [f"tc -n box-sw qdisc add dev {end}" for end in ("t0", "c0", "t1", "c1")]
    assert "ip -n box-sw link set p3 mtu 1500 master rack1" in lines(cluster)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "--nodes must be from 1 to 128"),
        ({"racks": 3}, "--racks must be from 1 to 2"),
        ({"rate": "fast"}, "--rate must be a rate such as"),
        ({"rate": "0mbit"}, "--rate must be a rate such as"),
        ({"rate": "0.0001kbit"}, "from 100kbit to 100gbit"),
        ({"rate": "99999999999gbit"}, "from 100kbit to 100gbit"),
        ({"racks": 2, "trunk_rate": "1kbit"}, "--trunk-rate must be a rate"),
        ({"burst": "many"}, "--burst must be a size"),
        ({"burst": "1500b"}, "from 3000b"),
        ({"burst": "5000mb"}, "to 3mb"),
        ({"trunk_rate": "1gbit"}, "give --racks 2 or more"),
        ({"name": "Box one"}, "--name must be"),
        ({"mtu": 100}, "--mtu must be from 576"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(BoxError, match=message):
        Cluster(**options)


@pytest.mark.parametrize("timeout", ["nan", "0", "-1"])
def test_a_timeout_that_never_or_always_ends_is_refused(timeout, capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(["run", "--timeout", timeout, "--", "true"])
    assert caught.value.code == 2
    assert "--timeout: must be seconds above 0" in capsys.readouterr().err


def test_rates_are_decimal():
    assert bits_per_second("1.5gbit") == 1.5e9
    assert bits_per_second("100mbit") == 1e8


def test_each_node_starts_torchrun_in_its_namespace_and_meets_at_node_zero():
    argv = launcher.node_command(
        Cluster(nodes=2, ranks_per_node=4), 1, ["exflow", "run"], per_node=False
    )
    assert argv[:4] == ["ip", "netns", "exec", "box-n1"]
    assert argv[4:8] == ["chrt", "--batch", "0", sys.executable]
    line = " ".join(argv[8:])
    assert line == (
        "-m torch.distributed.run --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr "
        "10.77.0.1 --master-port 29500 --local-addr 10.77.0.2 --no-python exflow run"
    )


def test_without_root_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(network.shutil, "which", lambda program: f"/sbin/{program}")
    assert __main__.main(["up"]) == 2
    assert "only root may make network namespaces" in capsys.readouterr().err


def test_without_iproute_it_names_the_package(monkeypatch, capsys):
    monkeypatch.setattr(network.shutil, "which", lambda program: None)
    assert __main__.main(["run", "--", "true"]) == 2
    assert "ip and tc not found; install the package iproute2" in capsys.readouterr().err
