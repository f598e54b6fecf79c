"""What it costs to lose nothing: commit latency and throughput with the agent as the synchronous standby, S3 endpoints
that take 5 and 30 ms for every request, beside `pg_receivewal --synchronous` on the same disk and no standby at all.

Owns: who is the synchronous standby, the load, and the figures. Prints them, judges nothing.
"""

import re
import statistics
import time

from place import KEY, SECRET, metric, wait

CLIENTS = (1, 16, 64)
DELAYS_MS = (5, 30)


class Sync:
    """Commits that wait: pgbench -N, each commit a transaction of its own."""

    def __init__(self, site, options):
        self.site, self.seconds = site, max(3, options.samples // 6)

    def run(self):
        site = self.site
        site.start_cluster(synchronous_commit="on", max_connections=100)
        site.pgbench("-i", "-q", "-s", "50")
        print(f"pgbench -N, {self.seconds} s each; transactions per second, average and p99 latency", flush=True)
        print(f"{'synchronous standby':34}" + "".join(f"{f'{clients} clients':>28}" for clients in CLIENTS))
        self.row("none")
        self.receivewal()
        for delay in DELAYS_MS:
            self.highwater(delay)

    def receivewal(self):
        site = self.site
        into = site.fresh("receivewal")
        site.sql("SELECT pg_create_physical_replication_slot('receivewal', true)")
        receiver = site.spawn("receivewal", site.pg_bin / "pg_receivewal", "-h", site.socket, "-U", "postgres", "-D", into,
                              "--slot", "receivewal", "--synchronous", "--no-password")
        self.name("pg_receivewal")
        self.row("pg_receivewal --synchronous")
        self.name("")
        site.end(receiver)
        site.sql("SELECT pg_drop_replication_slot('receivewal')")

    def highwater(self, delay):
        site = self.site
        site.start_endpoints = lambda: endpoints(site, delay)
        config, port = site.configure("s3", slot=f"highwater_{delay}", extra="[wal]\nsynchronous = true\n")
        agent = site.spawn(f"agent-{delay}", *site.agent(config, "run"))
        wait(lambda: metric(port, "highwater_lag_bytes") == 0, 60, "the agent is current")
        self.name("highwater")
        # A start is no part of the steady state: how long it holds a commit up is told by itself.
        first = self.commit()
        site.end(agent)
        agent = site.spawn(f"agent-{delay}-again", *site.agent(config, "run"))
        again = self.commit()
        self.row(f"Highwater, two regions, {delay} ms")
        print(f"  the first commit waited {first:.2f} s, the first one after a restart of the agent {again:.2f} s", flush=True)
        self.name("")
        site.end(agent)
        site.sql(f"SELECT pg_drop_replication_slot('highwater_{delay}')")

    def name(self, standby):
        """Makes it the synchronous standby, and waits until it is one."""
        site = self.site
        site.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{standby}'")
        site.sql("SELECT pg_reload_conf()")
        query = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming'"
        wait(lambda: site.sql(query) == ("1" if standby else "0"), 30, f"the synchronous standby is {standby or 'nobody'}")

    def commit(self):
        """Seconds that one commit takes now."""
        began = time.monotonic()
        self.site.sql("CREATE TABLE IF NOT EXISTS waits (at timestamptz); INSERT INTO waits VALUES (now())")
        return time.monotonic() - began

    def row(self, what):
        print(f"{what:34}", end="", flush=True)
        for clients in CLIENTS:
            tps, average, p99 = self.load(clients)
            print(f"{f'{tps:.0f}/s {average:.1f} {p99:.1f} ms':>28}", end="", flush=True)
        print(flush=True)

    def load(self, clients):
        site = self.site
        logs = site.fresh("pgbench")
        said = site.run(site.pg_bin / "pgbench", "-h", site.socket, "-U", "postgres", "-n", "-N", "-c", clients, "-j",
                        min(clients, 2), "-T", self.seconds, "-l", f"--log-prefix={logs}/log", "postgres")
        took = sorted(int(line.split()[2]) / 1000 for path in logs.iterdir() for line in path.read_text().splitlines())
        if not took:
            raise RuntimeError(f"no transaction ended:\n{said}")
        tps = float(re.search(r"tps = ([0-9.]+)", said).group(1))
        return tps, statistics.fmean(took), took[min(len(took) - 1, int(len(took) * 0.99))]


def endpoints(site, delay):
    """Two empty S3 endpoints whose every answer takes so many milliseconds longer."""
    site.stop_endpoints()
    for number in (1, 2):
        name = f"s3-{number}"
        site.endpoints.append(site.spawn(name, site.work / "bin/highwater-s3", "--bucket", "archive", "--key", KEY,
                                         "--secret", SECRET, "--delay-ms", delay))
        wait(lambda name=name: (site.work / "log" / name).read_text().startswith("http"), 10, "an endpoint listens")
