"""`python -m launch.cluster_in_a_box up | run -- COMMAND | down`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

from launch.cluster_in_a_box import network, registry
from launch.cluster_in_a_box.cluster import Cluster
from launch.cluster_in_a_box.errors import BoxError
from launch.cluster_in_a_box.launcher import launch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launch.cluster_in_a_box.network import Counters

USER_ERROR_EXIT = 2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHAPE = ("nodes", "ranks_per_node", "rate", "burst", "racks", "trunk_rate", "delay_ms", "mtu")


class StoppedError(Exception):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; the exit code."""
    args = parse(arguments)
    try:
        with stopping_on_signals():
            network.check_machine()
            for cluster in registry.abandoned():
                network.down(cluster)
            for cluster in registry.standing():
                network.end_abandoned(cluster)
            return int({"up": up, "run": run, "down": down}[args.action](args))
    except BoxError as error:
        say(f"error: {error}")
        return USER_ERROR_EXIT
    except StoppedError as error:
        say(f"stopped by {error}; the cluster is taken down")
        return error.exit_code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.cluster_in_a_box",
        description="Several nodes on one machine, joined by links of a set speed. Needs root.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up", help="make a cluster that stays")
    run = actions.add_parser("run", help="run a command on all ranks of a cluster")
    down = actions.add_parser("down", help="take a cluster down that `up` made")
    for sub in (up, run, down):
        sub.add_argument("--name", help="of the cluster, if there are several")
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
    for sub in (up, run):
        add_shape(sub)
    run.add_argument("--per-node", action="store_true", help="once a node, without torchrun")
    run.add_argument("--timeout", type=seconds, help="seconds after which it is stopped")
    run.add_argument("command", nargs=argparse.REMAINDER, help="what every rank runs, after --")
    args = parser.parse_args(arguments)
    if args.action == "run" and args.command[:1] == ["--"]:
        args.command = args.command[1:]
    return args


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Options that describe a cluster."""
    parser.add_argument("--nodes", type=int, help="default 2")
    parser.add_argument("--ranks-per-node", type=int, help="default 1")
    parser.add_argument("--rate", help="of a node's link, each way: 100mbit; default unlimited")
    parser.add_argument("--burst", help="default 256kb, above 500mbit 512kb")
    parser.add_argument("--racks", type=int, help="spread the nodes over so many; default 1")
    parser.add_argument("--trunk-rate", help="of a rack's link to the others; default unlimited")
    parser.add_argument("--delay-ms", type=float, help="from node to node, one way; default 0")
    parser.add_argument("--mtu", type=int, help="largest packet; default 1500")


def seconds(text: str) -> float:
    """A time above 0."""
    value = float(text)
    if not value > 0:
        msg = f"must be seconds above 0, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return value


def up(args: argparse.Namespace) -> int:
    """Make a cluster and leave it."""
    cluster = Cluster(**shape(args), name=args.name or "box")
    network.up(cluster, is_kept=True)
    addresses = {f"n{node}": cluster.address(node) for node in range(cluster.nodes)}
    if args.json:
        print(json.dumps({"name": cluster.name, "namespaces": cluster.namespaces, **addresses}))
    else:
        say(f"{cluster.name} is up: {', '.join(cluster.namespaces)}; `down` removes it")
    return 0


def run(args: argparse.Namespace) -> int:
    """Run a command on the cluster that is up, or on one made for it."""
    standing = registry.find(args.name or "box")
    wanted = shape(args)
    if standing is not None:
        ranks = {"ranks_per_node": wanted.pop("ranks_per_node", standing.ranks_per_node)}
        if wanted and any(getattr(standing, key) != value for key, value in wanted.items()):
            msg = (
                f"the cluster {standing.name!r} that is up has another shape than asked for; "
                "leave the options away, take it down, or choose another --name"
            )
            raise BoxError(msg)
        cluster = Cluster(**(vars(standing) | ranks))
        return execute(cluster, args)
    cluster = Cluster(**wanted, name=args.name or f"box{os.getpid()}")
    with network.built(cluster):
        return execute(cluster, args)


def execute(cluster: Cluster, args: argparse.Namespace) -> int:
    """Run the command between two readings of the counters."""
    before, start = network.counters(cluster), time.monotonic()
    code = launch(
        cluster,
        args.command,
        per_node=args.per_node,
        timeout=args.timeout,
        stdout=sys.stderr if args.json else None,
    )
    seconds, after = time.monotonic() - start, network.counters(cluster)
    report = describe(cluster, before, after)
    if args.json:
        print(json.dumps({"returncode": code, "seconds": round(seconds, 3), **report}))
    else:
        for name, counts in report["interfaces"].items():
            say(f"{name}: sent {counts['sent_bytes']} bytes, received {counts['received_bytes']}")
    return code


def describe(cluster: Cluster, before: Counters, after: Counters) -> dict[str, Any]:
    """What the interfaces counted in between."""
    moved = {
        name: {key: after[name][key] - before[name][key] for key in counts}
        for name, counts in before.items()
    }
    return {
        **{key: getattr(cluster, key) for key in SHAPE},
        "interfaces": moved,
        "before": before,
        "after": after,
        "inter_node_bytes": sum(
            counts["sent_bytes"] for name, counts in moved.items() if name.startswith("n")
        ),
    }


def down(args: argparse.Namespace) -> int:
    """Take a cluster down."""
    name = args.name or "box"
    cluster = registry.find(name)
    if cluster is None:
        msg = f"no cluster {name!r} is up"
        raise BoxError(msg)
    network.down(cluster)
    if args.json:
        print(json.dumps({"name": name, "removed": cluster.namespaces}))
    return 0


def shape(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given."""
    return {key: getattr(args, key) for key in SHAPE if getattr(args, key) is not None}


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """The first signal becomes an exception, so that everything is cleaned up; later ones wait."""

    def stop(number: int, _frame: object) -> NoReturn:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise StoppedError(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """A line to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
