"""The figures that are promised rather than compared: how old the newest durable commit is, how much memory a backlog
takes while a region does not answer, and how long PostgreSQL takes to stop.

Owns: measuring them from outside, with a client's clock and the agent's metrics. Prints figures, judges nothing.
"""

import signal
import subprocess
import time
from pathlib import Path

from place import metric, wait

POLL = 0.01


class Lag:
    """From a commit's acknowledgement to its durability in both regions, S3 endpoints on this machine."""

    def __init__(self, site, options):
        self.site, self.samples = site, options.samples

    def run(self):
        site = self.site
        site.start_cluster()
        site.pgbench("-i", "-q", "-s", "20")
        site.sql("CREATE TABLE lag (at timestamptz)")
        config, port = site.configure("s3")
        agent = site.spawn("agent", *site.agent(config, "run"))
        wait(lambda: metric(port, "highwater_lag_bytes") == 0, 60, "the agent is current")
        self.show("one small commit a second", self.delays(port))
        seconds = self.samples * 3
        load = site.load(8, seconds)
        time.sleep(2)
        self.show("beside pgbench with 8 clients", self.delays(port))
        site.end(load)
        site.end(agent)

    def delays(self, port):
        delays = []
        for _ in range(self.samples):
            began = time.monotonic()
            place = int(self.site.sql("INSERT INTO lag VALUES (now()); SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"))
            acknowledged = time.monotonic()
            while (metric(port, "highwater_durable_lsn") or 0) < place:
                time.sleep(POLL)
                if time.monotonic() - acknowledged > 60:
                    raise RuntimeError("a commit was not durable within 60 s")
            delays.append(time.monotonic() - acknowledged)
            time.sleep(max(0, 1 + (time.time() % 0.3) - (time.monotonic() - began)))
        return sorted(delays)

    def show(self, what, delays):
        at = lambda share: delays[min(len(delays) - 1, int(len(delays) * share))]
        print(f"{what}: {len(delays)} commits, p50 {at(0.5):.2f} s, p99 {at(0.99):.2f} s, max {delays[-1]:.2f} s", flush=True)


class Drain:
    """Peak memory of the agent while it drains a backlog into one region and the other is frozen."""

    def __init__(self, site, options):
        self.site, self.segments = site, options.segments

    def run(self):
        site = self.site
        site.start_cluster(wal_keep_size=f"{(self.segments + 64) * 16}MB")
        site.pgbench("-i", "-q", "-s", "20")
        config, port = site.configure("s3")
        # An archive begins when every region has been read once.
        first = site.spawn("agent-first", *site.agent(config, "run"))
        wait(lambda: (metric(port, "highwater_durable_lsn") or 0) > 0, 60, "the archive has begun")
        site.end(first)
        begin = site.wal_end()
        end = site.make_backlog(self.segments)
        frozen = site.endpoints[1]
        frozen.send_signal(signal.SIGSTOP)
        agent = site.spawn("agent", *site.agent(config, "run"))
        try:
            stored = lambda region: metric(port, f'highwater_region_stored_lsn{{region="region-{region}"}}') or 0
            started = time.monotonic()
            wait(lambda: stored(1) >= end, 1800, "the healthy region has the backlog")
            print(f"{(end - begin) / 1e9:.2f} GB drained into one region in {time.monotonic() - started:.1f} s with the other frozen; "
                  f"peak memory {self.peak(agent)} MiB", flush=True)
        finally:
            frozen.send_signal(signal.SIGCONT)
        thawed = time.monotonic()
        wait(lambda: stored(2) >= end, 1800, "the other region is filled")
        print(f"the other region was filled {time.monotonic() - thawed:.1f} s after it was thawed; peak memory {self.peak(agent)} MiB")
        site.end(agent)

    def peak(self, process: subprocess.Popen):
        status = Path(f"/proc/{process.pid}/status").read_text()
        return next(int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("VmHWM"))


class Stop:
    """How long `pg_ctl stop -m fast` takes under the agent, and without one, idle and under load."""

    def __init__(self, site, options):
        self.site, self.runs = site, options.runs

    def run(self):
        site = self.site
        site.start_cluster()
        site.pgbench("-i", "-q", "-s", "20")
        self.series("no agent")
        config, self.port = site.configure("s3")
        agent = site.spawn("agent", *site.agent(config, "run"))
        self.current()
        self.series("agent", self.current)
        site.end(agent)

    def current(self):
        streams = 'highwater_connection{state="streaming"}'
        wait(lambda: metric(self.port, streams) == 1 and metric(self.port, "highwater_lag_bytes") == 0, 60, "the agent is current")

    def series(self, beside, ready=lambda: None):
        for load in (False, True):
            took = []
            for _ in range(self.runs):
                ready()
                took.append(self.stop(load))
            print(f"{beside}, {'pgbench with 8 clients' if load else 'idle'}: "
                  f"{', '.join(f'{seconds:.2f}' for seconds in took)} s", flush=True)

    def stop(self, loaded):
        site = self.site
        load = site.load(8, 600) if loaded else None
        time.sleep(3)
        began = time.monotonic()
        site.stop_cluster()
        took = time.monotonic() - began
        if load:
            site.end(load)
        site.start_server()
        return took


PROMISES = {"lag": Lag, "drain": Drain, "stop": Stop}
