"""`python -m tests.chaos --faults 40 --seed 0`: many faults, each survived, or exit status 1."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.chaos.recipe import CHECKPOINT_EVERY, prepare, tiny_recipe
from tests.chaos.report import to_summary, to_table, write
from tests.chaos.scenario import Verdict, disturbed, steps_for, undisturbed
from tests.chaos.testbeds import HostsTestbed, SmallDisk, Testbed
from tests.hosts.network import why_not
from tests.hosts.ray_cluster import ROOT

RESULTS = ROOT / "docs" / "results" / "chaos.md"
# Beside what only two hosts can suffer, workers die there too.
ALSO_ON_HOSTS = ("worker killed in forward", "worker killed in backward")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Hosts, disks and drivers are removed on the way out, also where a time limit ends this.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    draw = random.Random(options.seed)
    rounds = _plan(options.faults, options.only, draw)
    num_planned = sum(len(faults) for _, faults in rounds)
    longest = max(len(faults) for _, faults in rounds)
    root = Path(tempfile.mkdtemp(prefix="moe-dist-chaos-"))
    print(f"{num_planned} faults in {len(rounds)} runs; logs in {root}", flush=True)
    recipe = tiny_recipe(root, steps_for(longest))
    prepared = prepare(recipe, root)
    verdicts: list[Verdict] = []
    for kind in (Testbed, HostsTestbed):
        chosen = [faults for name, faults in rounds if name == kind.name]
        if not chosen:
            continue
        with ExitStack() as stack:
            outputs = root / f"outputs-{kind.name}"
            if any(FAULTS[fault].needs_small_disk for faults in chosen for fault in faults):
                stack.enter_context(SmallDisk(outputs))
            testbed = stack.enter_context(kind())
            expected = undisturbed(
                testbed,
                recipe,
                prepared,
                records=root / f"{kind.name}-undisturbed",
                output_dir=outputs / "undisturbed",
            )
            for number, faults in enumerate(chosen):
                name = f"{kind.name}-{number}"
                verdict = disturbed(
                    testbed,
                    recipe,
                    prepared,
                    expected,
                    faults,
                    draw,
                    records=root / name,
                    output_dir=outputs / name,
                )
                verdicts.append(verdict)
                print(f"\n{name}, {verdict.seconds:.0f} s\n{to_table([verdict])}", flush=True)
                print("".join(f"WRONG: {text}\n" for text in verdict.problems), flush=True)
    print(to_summary(verdicts, num_planned))
    if options.write:
        write(verdicts, num_planned, RESULTS, CHECKPOINT_EVERY)
    done = sum(len(verdict.incidents) for verdict in verdicts)
    return int(done < num_planned or any(verdict.problems for verdict in verdicts))


def _plan(num_faults: int, only: Sequence[str], draw: random.Random) -> list[tuple[str, list[str]]]:
    """Deal the faults into runs: rounds of every kind, in an order of its own each time."""
    missing = why_not()
    chosen = [name for name in FAULTS if not only or name in only]
    local = [name for name in chosen if not FAULTS[name].needs_hosts]
    hosts = [name for name in chosen if FAULTS[name].needs_hosts]
    hosts += [name for name in ALSO_ON_HOSTS if name in chosen]
    if os.geteuid() != 0:
        print("no full disk: mounting one needs root")
        local = [name for name in local if not FAULTS[name].needs_small_disk]
    if missing is not None:
        print(f"no faults of two hosts: {missing}")
        hosts = []
    rounds: list[tuple[str, list[str]]] = []
    while sum(len(faults) for _, faults in rounds) < num_faults:
        for testbed, names in ((Testbed.name, local), (HostsTestbed.name, hosts)):
            if names:
                rounds.append((testbed, draw.sample(names, len(names))))
    return rounds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=40, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of order, moments and details")
    parser.add_argument("--only", nargs="*", default=[], choices=list(FAULTS), help="these kinds")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
