"""What a cluster in a box looks like, and the commands that build it. No effects in this file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launch.cluster_in_a_box.errors import BoxError

RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)")
SIZE = re.compile(r"(\d+)(b|kb|mb)")
NAME = re.compile(r"[a-z][a-z0-9]{0,30}")
BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
BYTES = {"b": 1, "kb": 1024, "mb": 1024**2}
MAX_NODES = 128
# What tc's counters of 32 bits hold: queue and burst in bytes, and a burst's time at the rate.
RATES = ("100kbit", "100gbit")
LARGEST_BURST = "3mb"
CONGESTION_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"
WIRE_RATE_OF_SMALL_BURST = 500e6

Command = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes, links and racks.

    Attributes:
        name: what its namespaces are called after.
        nodes: how many.
        ranks_per_node: processes that `run` starts on each.
        rate: of each node's uplink and of its downlink, as tc writes it ("100mbit"); None for as
            fast as the machine goes.
        burst: bytes a link may send at once ("256kb"); None chooses by the rate.
        racks: nodes are spread over so many, in order; 1 for a single switch.
        trunk_rate: of a rack's link to the others, each way.
        delay_ms: from node to node, one way, in milliseconds.
        mtu: largest packet.
    """

    name: str = "box"
    nodes: int = 2
    ranks_per_node: int = 1
    rate: str | None = None
    burst: str | None = None
    racks: int = 1
    trunk_rate: str | None = None
    delay_ms: float = 0.0
    mtu: int = 1500

    def __post_init__(self) -> None:
        self._check_counts()
        if not NAME.fullmatch(self.name):
            msg = f"--name must be lower-case letters and digits, got {self.name!r}"
            raise BoxError(msg)
        for option, rate in (("--rate", self.rate), ("--trunk-rate", self.trunk_rate)):
            if rate is not None and not _is_rate(rate):
                msg = (
                    f"{option} must be a rate such as 500kbit or 1gbit, from {RATES[0]} to "
                    f"{RATES[1]}, got {rate!r}"
                )
                raise BoxError(msg)
        least = 2 * self.mtu
        if self.burst is not None and not least <= _size(self.burst) <= _size(LARGEST_BURST):
            msg = (
                f"--burst must be a size such as 256kb, from {least}b (two packets of --mtu) to "
                f"{LARGEST_BURST}, got {self.burst!r}"
            )
            raise BoxError(msg)
        if self.trunk_rate is not None and self.racks == 1:
            msg = "--trunk-rate is the speed between racks; give --racks 2 or more with it"
            raise BoxError(msg)

    def _check_counts(self) -> None:
        bounds: dict[str, tuple[float, float, float]] = {
            "--nodes": (self.nodes, 1, MAX_NODES),
            "--ranks-per-node": (self.ranks_per_node, 1, 1024),
            "--racks": (self.racks, 1, self.nodes),
            "--delay-ms": (self.delay_ms, 0, 10_000),
            "--mtu": (self.mtu, 576, 9000),
        }
        for option, (value, least, most) in bounds.items():
            if not least <= value <= most:
                msg = f"{option} must be from {least} to {most}, got {value}"
                raise BoxError(msg)

    @property
    def switch(self) -> str:
        """The namespace of bridges and trunks."""
        return f"{self.name}-sw"

    @property
    def namespaces(self) -> list[str]:
        """All namespaces, the switch's first."""
        return [self.switch, *(self.namespace(node) for node in range(self.nodes))]

    def namespace(self, node: int) -> str:
        """A node's namespace."""
        return f"{self.name}-n{node}"

    def address(self, node: int) -> str:
        """A node's address."""
        return f"10.77.0.{node + 1}"

    def rack(self, node: int) -> int:
        """The rack a node stands in: the first nodes in the first."""
        return node * self.racks // self.nodes


def bits_per_second(rate: str) -> float:
    """A rate as tc writes it, as a number: "100mbit" is 1e8."""
    match = RATE.fullmatch(rate)
    assert match is not None
    return float(match[1]) * BITS[match[2]]


def _is_rate(rate: str) -> bool:
    least, most = map(bits_per_second, RATES)
    return RATE.fullmatch(rate) is not None and least <= bits_per_second(rate) <= most


def _size(burst: str) -> int:
    """Bytes as tc writes them, as a number; -1 if it is not written so."""
    match = SIZE.fullmatch(burst)
    return int(match[1]) * BYTES[match[2]] if match else -1


def up_commands(cluster: Cluster) -> list[Command]:
    """What makes the cluster, in order."""
    commands = [c for name in cluster.namespaces for c in _namespace(name)]
    commands += _switch(cluster)
    for node in range(cluster.nodes):
        commands += _node(cluster, node)
    return commands


def _namespace(name: str) -> list[Command]:
    """A namespace without IPv6, whose neighbour discovery would be counted as traffic.

    Its TCP is Reno, whatever the machine's own is: loss decides, as with the cubic of most clusters
    (which a namespace may not always choose); BBR paces short bursts by what it has seen before.
    """
    no_ipv6 = (
        "test ! -e /proc/sys/net/ipv6 || echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6"
    )
    return [
        ("ip", "netns", "add", name),
        ("ip", "netns", "exec", name, "sh", "-c", no_ipv6),
        ("ip", "netns", "exec", name, "sh", "-c", f"echo reno > {CONGESTION_CONTROL}"),
        ("ip", "-n", name, "link", "set", "lo", "up"),
    ]


def _switch(cluster: Cluster) -> list[Command]:
    in_switch = ("ip", "-n", cluster.switch, "link")
    bridges = [f"rack{rack}" for rack in range(cluster.racks)]
    if cluster.racks > 1:
        bridges.append("core")
    commands: list[Command] = []
    for bridge in bridges:
        commands.append((*in_switch, "add", bridge, "mtu", str(cluster.mtu), "type", "bridge"))
        commands.append((*in_switch, "set", bridge, "up"))
    for rack in range(cluster.racks if cluster.racks > 1 else 0):
        near, far = f"t{rack}", f"c{rack}"
        commands.append((*in_switch, "add", near, "type", "veth", "peer", "name", far))
        for end, bridge in ((near, f"rack{rack}"), (far, "core")):
            commands += _plug(cluster, end, bridge)
            commands += _shape(cluster, cluster.switch, end, cluster.trunk_rate)
    return commands


def _node(cluster: Cluster, node: int) -> list[Command]:
    """A node's cable: a veth pair, or two taps that a delaying process joins."""
    inside, switch, port = cluster.namespace(node), cluster.switch, f"p{node}"
    mtu = str(cluster.mtu)
    if cluster.delay_ms > 0:
        cable: list[Command] = [
            ("ip", "-n", inside, "tuntap", "add", "dev", "eth0", "mode", "tap"),
            ("ip", "-n", switch, "tuntap", "add", "dev", port, "mode", "tap"),
        ]
    else:
        pair = ("type", "veth", "peer", "name", port, "netns", switch)
        cable = [("ip", "-n", inside, "link", "add", "eth0", *pair)]
    return [
        *cable,
        ("ip", "-n", inside, "link", "set", "eth0", "mtu", mtu),
        ("ip", "-n", inside, "addr", "add", f"{cluster.address(node)}/24", "dev", "eth0"),
        ("ip", "-n", inside, "link", "set", "eth0", "up"),
        *_plug(cluster, port, f"rack{cluster.rack(node)}"),
        *_shape(cluster, inside, "eth0", cluster.rate),
        *_shape(cluster, switch, port, cluster.rate),
    ]


def _plug(cluster: Cluster, port: str, bridge: str) -> list[Command]:
    link = ("ip", "-n", cluster.switch, "link", "set", port)
    return [(*link, "mtu", str(cluster.mtu), "master", bridge), (*link, "up")]


def _shape(cluster: Cluster, namespace: str, device: str, rate: str | None) -> list[Command]:
    """A token bucket on what leaves by a device."""
    if rate is None:
        return []
    is_slow = bits_per_second(rate) <= WIRE_RATE_OF_SMALL_BURST
    burst = cluster.burst or ("256kb" if is_slow else "512kb")
    bucket = ("tbf", "rate", rate, "burst", burst, "latency", "100ms")
    return [("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *bucket)]
