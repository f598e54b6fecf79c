"""scripts/bench.sh: measures one kind of work with Highwater and with its peers, side by side on the same data."""

import argparse
import platform
import os
import signal
import statistics
import sys

from place import Site
from promises import PROMISES
from sync import Sync
from works import WORKS

PROMISES["sync"] = Sync


def parse():
    parser = argparse.ArgumentParser(prog="bench.sh", description=__doc__)
    parser.add_argument("work", choices=[*WORKS, *PROMISES])
    parser.add_argument("--scale", type=int, help="pgbench scale of the database, about 15 MB each (default 350; replay 50)")
    parser.add_argument("--segments", type=int, default=128, help="WAL segments of 16 MiB (default 128)")
    parser.add_argument("--samples", type=int, default=60, help="lag: commits per situation (default 60)")
    parser.add_argument("--runs", type=int, default=3, help="how often each tool runs (default 3)")
    parser.add_argument("--tls", action="store_true", help="S3 endpoints speak TLS, which pgBackRest needs of them")
    parser.add_argument("--only", default="", help="only tools whose name contains this, or one of several (A,B); the first peer always runs")
    options = parser.parse_args()
    if options.scale is None:
        options.scale = 50 if options.work == "replay" else 350
    return options


# A run from which the host took more than this says how busy the host was.
STOLEN, ATTEMPTS = 0.05, 5


def undisturbed(work, name, tool):
    """What the tool costs while the machine has its processors to itself; the least disturbed of several runs if it never has."""
    costs = []
    while len(costs) < ATTEMPTS:
        work.warm()
        costs.append(tool())
        if costs[-1].stolen <= STOLEN:
            return costs[-1]
        print(f"  not counted: {name}: {costs[-1].wall:.2f} s, {costs[-1].stolen:.0%} of the processors taken by the host", flush=True)
    return min(costs, key=lambda cost: cost.stolen)


def measure(work, options):
    """Every tool once per round, so that what else happens on the machine meets all of them. Each round begins with another
    tool, so that what one leaves behind does not always meet the same one."""
    wanted = options.only.split(",")
    tools = [tool for place, tool in enumerate(work.tools()) if place == 0 or any(part in tool[0] for part in wanted)]
    costs = {name: [] for name, _ in tools}
    for number in range(options.runs):
        first = number * len(tools) // options.runs
        for name, tool in tools[first:] + tools[:first]:
            cost = undisturbed(work, name, tool)
            costs[name].append(cost)
            print(f"  round {number + 1}: {name}: {cost.wall:.2f} s, {cost.cpu:.2f} CPU s, {cost.stolen:.0%} taken", flush=True)
    return costs


def show(work, costs):
    gigabytes = work.plain / 1e9
    names = list(costs)
    median = {name: statistics.median(cost.wall for cost in costs[name]) for name in names}
    cpu = {name: statistics.median(cost.cpu for cost in costs[name]) for name in names}
    width = max(map(len, names))
    print(f"\n{'':{width}}      wall s          MB/s     CPU   CPU s   largest  servers'   stored   to the first line")
    print(f"{'tool':{width}}    min  median               s     /GB   process    CPU s       MB     wall     CPU")
    for name in names:
        runs = costs[name]
        stored = max(cost.stored for cost in runs)
        peak = max(cost.peak for cost in runs) >> 20
        print(f"{name:{width}} {min(cost.wall for cost in runs):6.2f} {median[name]:7.2f} {work.plain / 1e6 / median[name]:9.0f}"
              f" {cpu[name]:7.2f} {cpu[name] / gigabytes:7.2f} {f'{peak}M' if peak else '<20M':>9}"
              f" {statistics.median(cost.server for cost in runs):8.2f} {f'{stored / 1e6:.0f}' if stored else '-':>8}"
              f" {median[name] / median[names[0]]:7.2f}x {cpu[name] / max(cpu[names[0]], 0.01):6.2f}x")


def main():
    options = parse()
    site = Site(os.environ["BENCH_WORK"], os.environ["BENCH_PG_BIN"], os.environ["BENCH_USER"], options.tls)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.work in PROMISES:
            PROMISES[options.work](site, options).run()
            return 0
        work = WORKS[options.work](site, options)
        print(f"preparing: {work.__doc__.strip()}", flush=True)
        work.prepare()
        print(f"{work.plain / 1e9:.2f} GB, {options.runs} rounds", flush=True)
        costs = measure(work, options)
        show(work, costs)
        print(f"\nwall and CPU are medians, memory and size the largest. {os.cpu_count()} processors, {platform.release()}. "
              f"PostgreSQL's walsender and the S3 endpoints are the servers; they share the processors. "
              f"The host took at most {max(cost.stolen for runs in costs.values() for cost in runs):.0%} of them from a run that counts.")
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    finally:
        site.close()
    return 0


sys.exit(main())
