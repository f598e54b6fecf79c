"""The four works. Each prepares the data once, then offers tools: named functions that do the work once, from
nothing, and return its cost. A tool named "highwater ..." is ours, every other one a peer.

All tools of a work read the same data in the same run of the benchmark.
"""

import contextlib
import shutil

from place import KEY, SECRET, metric, size_of, wait

MIB = 1 << 20
SEGMENT = 16 * MIB


class Work:
    def __init__(self, site, options):
        self.site, self.options, self.plain = site, options, 0

    def lz4(self):
        """Whether this PostgreSQL's programs were built with lz4."""
        return "lz4" in self.site.run(self.site.pg_bin / "pg_config", "--configure")

    def database(self, **settings):
        site = self.site
        site.start_cluster(**settings)
        site.pgbench("-i", "-q", "-s", str(self.options.scale))
        site.sql("CHECKPOINT")
        self.plain = size_of(site.data / "base") + size_of(site.data / "global")

    def warm(self):
        """Before each tool: nobody pays for what another one has pushed out of the page cache."""

    def has_pgbackrest(self):
        return shutil.which("pgbackrest") is not None

    def pgbackrest(self, name, command, *words, **settings):
        """A pgBackRest command with a repository of that name, lz4 and two processes."""
        site = self.site
        given = {"repo1-path": site.work / name, "spool-path": site.work / "spool", "lock-path": site.work / "lock",
                 "log-path": site.work / "log", "log-level-console": "warn", "log-level-file": "off",
                 "compress-type": "lz4", "process-max": 2, "start-fast": "y", "archive-check": "n", **settings}
        server = {"pg1-path": site.data, "pg1-socket-path": site.socket, "pg1-user": "postgres"}
        server.update((key, given.pop(key)) for key in list(given) if key in server)
        text = ["[global]", *(f"{key}={value}" for key, value in given.items()),
                "[bench]", *(f"{key}={value}" for key, value in server.items())]
        config = site.work / f"pgbackrest-{name}-{command}.conf"
        config.write_text("\n".join(text) + "\n")
        return ["pgbackrest", f"--config={config}", "--stanza=bench", command, *words]

    def bucket(self):
        """pgBackRest's settings for a repository in the first S3 endpoint."""
        host, port = self.site.endpoint(1).removeprefix("https://").rsplit(":", 1)
        return {"repo1-type": "s3", "repo1-path": "/pgbackrest", "repo1-s3-bucket": "archive", "repo1-s3-endpoint": host,
                "repo1-s3-region": "us-east-1", "repo1-s3-key": KEY, "repo1-s3-key-secret": SECRET,
                "repo1-s3-uri-style": "path", "repo1-storage-port": port,
                "repo1-storage-verify-tls": "n"}  # it knows no certificates for addresses

    @contextlib.contextmanager
    def archiving(self, kind, slot):
        """A running agent on fresh regions; gives its configuration and admin port."""
        site = self.site
        config, port = site.configure(kind, slot)
        agent = site.spawn(f"agent-{kind}", *site.agent(config, "run"))
        # Nothing is measured of an agent that still catches up.
        end = int(site.sql("SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')"))
        wait(lambda: (metric(port, "highwater_durable_lsn") or 0) >= end, 600, "the agent has caught up")
        try:
            yield config, port, agent
        finally:
            site.end(agent)


class Wal(Work):
    """Archiving a backlog of WAL."""

    def prepare(self):
        self.site.start_cluster()
        self.site.pgbench("-i", "-q", "-s", "20")
        self.site.sql("CHECKPOINT; SELECT pg_switch_wal()")
        self.site.sql("SELECT pg_create_physical_replication_slot('hold', true)")
        self.begin = self.site.wal_end() // SEGMENT * SEGMENT
        self.end, _ = self.site.make_wal(self.options.segments)
        self.plain = self.end - self.begin
        self.segments = [f"00000001{number >> 8:08X}{number & 255:08X}"
                         for number in range(self.begin // SEGMENT, self.end // SEGMENT)]

    @contextlib.contextmanager
    def slot(self, name):
        self.site.sql(f"SELECT pg_copy_physical_replication_slot('hold', '{name}')")
        yield name
        # A walsender lets go of its slot a moment after its client has gone.
        gone = f"SELECT count(*) FROM (SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{name}' AND NOT active) s"
        wait(lambda: self.site.sql(gone) == "1", 30, f"slot {name} can be dropped")

    def receivewal(self, *compress):
        site, to = self.site, self.site.fresh("received")
        with self.slot("receive") as slot:
            last = self.end - 8
            cost = site.measured(site.pg_bin / "pg_receivewal", "-D", to, "-S", slot, "--no-loop", *compress,
                                 f"--endpos={last >> 32:X}/{last & 0xFFFFFFFF:X}", "-h", site.socket, "-U", "postgres")
        cost.stored = size_of(to)
        return cost

    def copy(self):
        to = self.site.fresh("copied")
        paths = [self.site.data / "pg_wal" / name for name in self.segments]
        cost = self.site.synced(to, "cp", *paths, to)
        cost.stored = size_of(to)
        return cost

    def push(self, s3=False):
        """As PostgreSQL does it: one archive_command per segment; the first starts the worker that does them all."""
        site, repository, place = self.site, "repository", {}
        for directory in ("repository", "spool", "lock"):
            site.fresh(directory)
        if s3:
            site.start_endpoints()
            repository, place = "repository-s3", self.bucket()
        site.run(*self.pgbackrest(repository, "stanza-create", **place))
        status = site.data / "pg_wal/archive_status"
        for name in self.segments:
            site.run("touch", status / f"{name}.ready")
        command = " ".join(map(str, self.pgbackrest(repository, "archive-push", **{"archive-async": "y"}, **place)))
        paths = " ".join(str(site.data / "pg_wal" / name) for name in self.segments)
        cost = site.measured("sh", "-c", f"for segment in {paths}; do {command} $segment || exit 1; done")
        for name in self.segments:
            (status / f"{name}.ready").unlink(missing_ok=True)
        cost.stored = size_of(site.work / "repository")
        return cost

    def agent(self, kind, *settings):
        site = self.site
        with self.slot("drain") as slot:
            config, port = site.configure(kind, slot)
            cost = site.measured(*site.agent(config, *settings, "run"),
                                 until=lambda: (metric(port, "highwater_durable_lsn") or 0) >= self.end)
        cost.stored = size_of(site.work / "archive") if kind == "directory" else 0
        return cost

    def tools(self):
        zstd = ("--set", "wal.compression=zstd")
        if self.lz4():
            yield "pg_receivewal lz4", lambda: self.receivewal("--compress=lz4")
        yield "pg_receivewal", self.receivewal
        if self.has_pgbackrest():
            yield "pgbackrest async, 2 processes", self.push
            if self.site.tls:
                yield "pgbackrest async, one S3", lambda: self.push(s3=True)
        yield "cp of the segments, sync", self.copy
        yield "highwater to a directory", lambda: self.agent("directory")
        yield "highwater to two S3 regions", lambda: self.agent("s3")
        yield "highwater to two S3, zstd", lambda: self.agent("s3", *zstd)


class Backup(Work):
    """A base backup of a pgbench database."""

    def prepare(self):
        self.database()

    def warm(self):
        self.site.run("sh", "-c", f"find {self.site.data} -type f -exec cat {{}} + > /dev/null")

    def basebackup(self, *options):
        site, to = self.site, self.site.fresh("taken")
        cost = site.measured(site.pg_bin / "pg_basebackup", "-D", to, "-Ft", "-X", "none", "-c", "fast", *options, "-h",
                             site.socket, "-U", "postgres")
        cost.stored = size_of(to)
        return cost

    def tar(self):
        to = self.site.fresh("tarred")
        cost = self.site.synced(to, "tar", "-cf", to / "base.tar", "--exclude=pg_wal/*", "-C", self.site.data, ".", accept=(0, 1))
        cost.stored = size_of(to)
        return cost

    def copying(self, to):
        """The data directory without its WAL, as the other tools take it."""
        return ["find", self.site.data, "-mindepth", "1", "-maxdepth", "1", "!", "-name", "pg_wal", "-exec", "cp", "-a",
                "-t", to, "{}", "+"]

    def copy(self):
        to = self.site.fresh("copied")
        cost = self.site.synced(to, *self.copying(to), accept=(0, 1))
        cost.stored = size_of(to)
        return cost

    def rest(self, bundle, measured=True, s3=False):
        site, place = self.site, {}
        name = "repository-s3" if s3 else "repository-bundle" if bundle else "repository"
        site.fresh(name), site.fresh("lock")
        if s3:
            if measured:
                site.start_endpoints()
            place = self.bucket()
        site.run(*self.pgbackrest(name, "stanza-create", **place))
        command = self.pgbackrest(name, "backup", "--type=full",
                                  **{"repo1-bundle": "y" if bundle else "n"}, **place)
        if not measured:
            return site.run(*command)
        cost = site.measured(*command)
        cost.stored = size_of(site.work / name)
        return cost

    def agent(self, kind, *settings):
        """The backup command, and what the running agent spent meanwhile."""
        from meter import cpu_of
        site = self.site
        with self.archiving(kind, "bench_backup") as (config, _, agent):
            before = cpu_of([agent.pid])
            cost = site.measured(*site.agent(config, *settings, "backup"))
            cost.cpu += cpu_of([agent.pid]) - before
        site.run(*site.agent(config, "decommission"), accept=(0, 1))
        cost.stored = size_of(site.work / "archive") if kind == "directory" else 0
        return cost

    def tools(self):
        if self.lz4():
            yield "pg_basebackup client-lz4", lambda: self.basebackup("-Z", "client-lz4")
        yield "pg_basebackup", self.basebackup
        if self.has_pgbackrest():
            yield "pgbackrest, 2 processes", lambda: self.rest(False)
            yield "pgbackrest, 2 processes, bundles", lambda: self.rest(True)
            if self.site.tls:
                yield "pgbackrest, bundles, one S3", lambda: self.rest(True, s3=True)
        yield "tar, sync", self.tar
        yield "cp -a, sync", self.copy
        lz4 = ("--set", "backup.compression=lz4")
        yield "highwater to a directory", lambda: self.agent("directory")
        yield "highwater to a directory, lz4", lambda: self.agent("directory", *lz4)
        yield "highwater to two S3 regions", lambda: self.agent("s3")
        yield "highwater to two S3 regions, lz4", lambda: self.agent("s3", *lz4)


class Restore(Backup):
    """Building a data directory from a base backup; without replay."""

    def prepare(self):
        site = self.site
        self.database()
        self.configs = {}
        for kind in ("directory", "s3"):
            with self.archiving(kind, f"bench_{kind}") as (config, _, _):
                site.run(*site.agent(config, "backup"))
            self.configs[kind] = config
        if self.lz4():
            self.basebackup("-Z", "client-lz4")
        self.tar()
        if self.has_pgbackrest():
            self.rest(False, measured=False)
            self.rest(True, measured=False)
            if site.tls:
                self.rest(True, measured=False, s3=True)
        site.sql("CHECKPOINT")

    def warm(self):
        """What is restored comes from as many places as there are tools."""

    def into(self, *command, sync=False, accept=(0,)):
        """A tool that fills an empty target; with `sync` one that leaves the disk to the kernel."""
        def tool():
            self.site.fresh("restored")
            self.site.fresh("lock")
            if sync:
                return self.site.synced(self.target, *command, accept=accept)
            return self.site.measured(*command)
        return tool

    def tools(self):
        site = self.site
        self.target = site.work / "restored"
        if self.has_pgbackrest():
            for name, repository in (("", "repository"), (", bundles", "repository-bundle")):
                yield f"pgbackrest, 2 processes{name}", self.into(
                    *self.pgbackrest(repository, "restore", "--type=none", **{"pg1-path": self.target}))
            if site.tls:
                yield "pgbackrest, bundles, one S3", self.into(
                    *self.pgbackrest("repository-s3", "restore", "--type=none", **{"pg1-path": self.target}, **self.bucket()))
        if self.lz4() and shutil.which("lz4"):
            script = f"lz4 -dc {site.work}/taken/base.tar.lz4 | tar -xf - -C {self.target}"
            yield "lz4 | tar, sync", self.into("sh", "-c", script, sync=True)
        tar = ["tar", "-xf", site.work / "tarred/base.tar", "-C", self.target]
        yield "tar, sync", self.into(*tar, sync=True)
        yield "cp -a, sync", self.into(*self.copying(self.target), sync=True, accept=(0, 1))
        for kind, name in (("directory", "a directory"), ("s3", "one of two S3 regions")):
            yield f"highwater from {name}", self.into(
                *site.restore(self.configs[kind], "run", "--to-immediate", "--into", self.target))


class Replay(Wal):
    """Replaying WAL onto a base backup; the time is that between the server's own words in its log."""

    def prepare(self):
        site = self.site
        self.database()
        site.sql("SELECT pg_switch_wal()")
        site.sql("SELECT pg_create_physical_replication_slot('hold', true)")
        self.begin = site.wal_end() // SEGMENT * SEGMENT
        with self.archiving("directory", "bench_directory") as (directory, one, _), \
                self.archiving("s3", "bench_s3") as (s3, two, _):
            site.run(*site.agent(directory, "backup"))
            site.run(*site.agent(s3, "backup"))
            self.end, self.point = site.make_wal(self.options.segments)
            for port in (one, two):
                wait(lambda port=port: (metric(port, "highwater_durable_lsn") or 0) >= self.end, 600, "all is archived")
        self.configs = {"directory": directory, "s3": s3}
        self.plain = self.end - self.begin
        self.segments = [f"00000001{number >> 8:08X}{number & 255:08X}"
                         for number in range(self.begin // SEGMENT, self.end // SEGMENT)]
        self.copy()
        if self.has_pgbackrest():
            self.push()
        site.stop_cluster()

    def replay(self, kind, command=None, segments=False):
        site = self.site
        target = site.work / "replayed"
        shutil.rmtree(target, ignore_errors=True)
        lsn = f"{self.point >> 32:X}/{self.point & 0xFFFFFFFF:X}"
        site.run(*site.restore(self.configs[kind], "run", "--to-lsn", lsn, "--action", "shutdown", "--into", target))
        if command:
            with open(target / "postgresql.auto.conf", "a") as conf:
                conf.write("restore_command = '" + command.replace("'", "''") + "'\n")
        if segments:
            site.run("sh", "-c", f"cp {site.work}/copied/* {target}/pg_wal/")
        said_before = site.log.stat().st_size
        cost = site.measured(site.pg_bin / "postgres", "-D", target, "-c", "log_line_prefix=@%n ")
        with open(site.log, errors="replace") as log:
            log.seek(said_before)
            lines = [line for line in log if line.startswith("@")]

        def when(words):
            return next(float(line[1:].split()[0]) for line in lines if words in line)

        cost.wall = when("recovery stopping") - when("redo starts")
        return cost

    def get(self):
        self.site.fresh("spool")
        self.site.fresh("lock")
        command = self.pgbackrest("repository", "archive-get", "%f", '"%p"',
                                  **{"archive-async": "y", "pg1-path": self.site.work / "replayed"})
        return self.replay("directory", " ".join(map(str, command)))

    def tools(self):
        site = self.site
        yield "segments already in pg_wal", lambda: self.replay("directory", "false", segments=True)
        yield "cp", lambda: self.replay("directory", f'cp {site.work}/copied/%f "%p"')
        if self.has_pgbackrest():
            yield "pgbackrest async, 2 processes", self.get
        yield "highwater from a directory", lambda: self.replay("directory")
        yield "highwater from one of two S3 regions", lambda: self.replay("s3")


WORKS = {"wal": Wal, "backup": Backup, "restore": Restore, "replay": Replay}
