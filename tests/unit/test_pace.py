"""A search that is short of time leaves out steps, never the last ones, and says so."""

import signal
from itertools import pairwise
from threading import Event

import pytest
from typer.testing import CliRunner

from placement.cli import COMMANDS, make_app, mount
from placement.commands import place as place_command
from placement.interrupts import best_on_interrupt
from placement.plan import PlacementPlan
from placement.search import pace as pace_module
from placement.search.pace import Pace
from placement.strategies import PlacementOptions, affinity, exflow_milp, get_strategy
from placement.topology import Topology
from placement.traffic import count_traffic
from planted import planted_trace

STEPS, NEEDED = 20, 2


class Clock:
    """Time that passes only when told to."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    return clock


def run(pace, clock, seconds, *, effort=1.0):
    """The steps done of a phase whose steps take so many seconds each."""
    done = []
    with pace.phase("test", STEPS):
        for step in range(STEPS):
            if pace.step(effort, is_needed=step >= STEPS - NEEDED) > 0:
                clock.now += seconds
                done.append(step)
    return done


def test_without_a_limit_or_with_time_enough_every_step_is_done(clock):
    for pace in (Pace(), Pace(time_limit=40.0), Pace(interrupt=Event())):
        assert run(pace, clock, 1.0) == list(range(STEPS))
        assert not pace.was_hurried


@pytest.mark.parametrize("limit", [3.0, 7.0, 13.0])
def test_short_of_time_steps_are_left_out_all_along(clock, limit):
    pace, start = Pace(time_limit=limit), clock.now
    done = run(pace, clock, 1.0)
    assert pace.was_hurried
    assert limit - 2 <= clock.now - start <= limit + NEEDED
    assert done[-NEEDED:] == list(range(STEPS))[-NEEDED:]
    gaps = [b - a for a, b in pairwise(done)]
    assert max(gaps) <= STEPS / limit + 2


def test_an_interrupt_leaves_the_last_steps_with_at_most_the_usual_effort(clock):
    interrupt = Event()
    pace = Pace(interrupt=interrupt)
    interrupt.set()
    assert pace.is_over()
    assert run(pace, clock, 1.0, effort=8.0) == [18, 19]
    assert pace.step(8.0, is_needed=True) == 1.0
    assert pace.step(0.5, is_needed=True) == 0.5
    assert pace.step(0.5, is_needed=False) == 0.0


def pieces_of_a_step(pace, clock, *, effort, is_needed, moves):
    """The pieces of four moves that are done of a step, a second each."""
    with pace.phase("test", 2):
        pace.step(effort, is_needed=is_needed)
        done = []
        for piece in pace.pieces(moves, 4):
            done.append(piece)
            clock.now += 1.0
    return done


def test_time_that_ends_within_a_step_cuts_it_but_not_what_is_needed(clock):
    cut = pieces_of_a_step(Pace(time_limit=2.5), clock, effort=1.0, is_needed=False, moves=40)
    assert cut == [4, 4, 4]
    whole = pieces_of_a_step(Pace(time_limit=2.5), clock, effort=1.0, is_needed=True, moves=23)
    assert whole == [4, 4, 4, 4, 4, 3]
    half = pieces_of_a_step(Pace(time_limit=2.5), clock, effort=2.0, is_needed=True, moves=40)
    assert half == [4] * 5
    pace = Pace(time_limit=9.0)
    assert len(pieces_of_a_step(pace, clock, effort=1.0, is_needed=False, moves=32)) == 8
    assert not pace.was_hurried


@pytest.mark.parametrize(("slots", "effort"), [(4, 1.0), (6, 1.0), (6, 8.0)])
def test_interrupted_at_once_affinity_has_a_plan_within_the_cap_all_the_same(slots, effort):
    trace = planted_trace(experts=16, top_k=2, tokens=2000)
    topology = Topology(num_nodes=1, ranks_per_node=4)
    interrupt = Event()
    interrupt.set()
    options = PlacementOptions(max_imbalance=1.3, effort=effort, interrupt=interrupt)
    plan = get_strategy("affinity")(trace, topology, slots_per_rank=slots, options=options)
    assert plan.strategy.options["hurried"]
    assert plan.num_slots == trace.num_layers * 4 * slots
    traffic = count_traffic(trace, plan)
    assert traffic.imbalance()["max"] <= 1.3
    linear = count_traffic(trace, get_strategy("linear")(trace, topology))
    assert traffic.rows_per_token()["total"] < linear.rows_per_token()["total"]


@pytest.fixture
def _listens():
    """SIGINT as a shell's foreground has it, whatever other tests or the caller made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def call(folder, *words):
    planted_trace(experts=16, top_k=2, tokens=600).save(folder / "trace.safetensors")
    app = make_app("test")
    mount(app, COMMANDS)
    words = ("place", folder / "trace.safetensors", "-o", folder / "plan.json", *words)
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.mark.usefixtures("_listens")
def test_ctrl_c_writes_the_best_plan_so_far_and_leaves_the_table_out(tmp_path, monkeypatch, capfd):
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*args, **more):
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second one ends it
        return anneal_pairs(*args, **more)

    anneal_pairs = affinity.anneal_pairs
    monkeypatch.setattr(affinity, "anneal_pairs", interrupted)
    done = call(tmp_path)
    assert done.exit_code == 0
    assert "the best plan so far will be written" in capfd.readouterr().err
    assert "held-out" not in done.stdout
    assert PlacementPlan.load(tmp_path / "plan.json").strategy.options["hurried"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("_listens")
def test_ctrl_c_ends_the_process_while_a_solver_does_not_listen(tmp_path, monkeypatch):
    seen = []

    def milp(*args, **more):
        seen.append(signal.getsignal(signal.SIGINT))
        return solver(*args, **more)

    solver = exflow_milp.milp
    monkeypatch.setattr(exflow_milp, "milp", milp)
    done = call(tmp_path, "--strategy", "exflow-milp", "--time-limit", "2", "--no-compare")
    assert done.exit_code == 0
    assert set(seen) == {signal.SIG_DFL}


def test_where_ctrl_c_is_ignored_it_goes_on_being_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with best_on_interrupt(can_hurry=True) as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_listens")
def test_ctrl_c_in_the_table_is_no_signal_to_hurry(tmp_path, monkeypatch):
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(place_command, "_show_table", interrupted)
    done = call(tmp_path, "--effort", "0.2")
    assert done.exit_code != 0
    assert "hurried" not in PlacementPlan.load(tmp_path / "plan.json").strategy.options
