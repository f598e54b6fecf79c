"""The place where a benchmark happens: one PostgreSQL cluster, S3 endpoints, configurations, all below one
directory and all run by one unprivileged account.

Owns: starting and ending them. Does not own: what is measured.
"""

import contextlib
import http.client
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import meter

KEY, SECRET = "bench", "bench-secret"


class Site:
    def __init__(self, work, pg_bin, user, tls=False):
        self.work, self.pg_bin, self.tls = Path(work), Path(pg_bin), tls
        self.log = self.work / "log" / "tools"
        entry = pwd.getpwnam(user)
        root = os.geteuid() == 0
        self.account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []} if root else {}
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(self.work), "LANG": "C.UTF-8",
                            "NO_PROXY": "127.0.0.1", "HIGHWATER_LOG": "warn"}
        self.data, self.socket = self.work / "primary", self.work / "socket"
        self.endpoints, self.running = [], []

    # Programs

    def run(self, *command, accept=(0,), **more):
        """Runs a helper command to its end; what it says matters only when it fails."""
        done = subprocess.run([str(word) for word in command], cwd=self.work, env=self.environment, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, check=False, **self.account, **more)
        if done.returncode not in accept:
            raise RuntimeError(f"{' '.join(map(str, command[:3]))} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def spawn(self, name, *command):
        log = open(self.work / "log" / name, "wb")
        process = subprocess.Popen([str(word) for word in command], cwd=self.work, env=self.environment, stdout=log,
                                   stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, **self.account)
        self.running.append(process)
        return process

    def end(self, process, how=signal.SIGTERM):
        if process.poll() is None:
            process.send_signal(how)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.running.remove(process)

    def measured(self, *command, until=None, accept=(0,)):
        """Runs a command under the meter, with the CPU that PostgreSQL and the endpoints spent meanwhile."""
        os.sync()  # nobody pays for what others left to be written
        before, stolen, began = meter.cpu_of(self.servers()), meter.stolen_seconds(), time.monotonic()
        cost = meter.measure(command, self.account, self.log, self.environment, self.work, until, accept)
        cost.stolen = (meter.stolen_seconds() - stolen) / (time.monotonic() - began) / os.cpu_count()
        time.sleep(0.2)  # a walsender outlives its client by a moment
        cost.server = meter.cpu_of(self.servers()) - before
        return cost

    def synced(self, to, *command, accept=(0,)):
        """A copying tool that leaves the disk to the kernel, with the sync that the others do themselves."""
        script = 'to="$1"; shift; "$@"; code=$?; sync -f "$to" && exit "$code"'
        return self.measured("sh", "-c", script, "sh", to, *command, accept=accept)

    def servers(self):
        pids = [process.pid for process in self.endpoints]
        with contextlib.suppress(OSError, IndexError):
            pids.append(int((self.data / "postmaster.pid").read_text().split()[0]))
        return pids

    def fresh(self, name):
        """An empty directory of that name, owned by the account."""
        directory = self.work / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700)
        self._own(directory)
        return directory

    def _own(self, path):
        if self.account:
            os.chown(path, self.account["user"], self.account["group"])

    # PostgreSQL

    def start_cluster(self, **settings):
        self.run(self.pg_bin / "initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C")
        fixed = {"listen_addresses": "", "unix_socket_directories": self.socket, "shared_buffers": "512MB",
                 "max_wal_size": "4GB", "checkpoint_timeout": "30min", "autovacuum": "off", "max_wal_senders": 20,
                 "max_replication_slots": 20, "synchronous_commit": "off"}
        with open(self.data / "postgresql.conf", "a") as conf:
            for name, value in {**fixed, **settings}.items():
                conf.write(f"{name} = '{value}'\n")
        self.start_server()
        self.sql("CREATE ROLE highwater LOGIN REPLICATION; GRANT pg_monitor TO highwater")

    def start_server(self):
        self.run(self.pg_bin / "pg_ctl", "-D", self.data, "-l", self.work / "log" / "primary", "-w", "start")

    def client(self, name):
        """A client program; there are packages of a server without them, and those of another version do as well."""
        own = self.pg_bin / name
        return own if own.exists() else shutil.which(name)

    def load(self, clients, seconds):
        """pgbench, running."""
        return self.spawn("load", self.client("pgbench"), "-h", self.socket, "-U", "postgres", "-n", "-c", str(clients), "-j", "2",
                          "-T", str(seconds), "postgres")

    def stop_cluster(self):
        if (self.data / "postmaster.pid").exists():
            self.run(self.pg_bin / "pg_ctl", "-D", self.data, "-w", "-m", "fast", "stop")

    def sql(self, text):
        return self.run(self.client("psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", self.socket, "-U", "postgres",
                        "-d", "postgres", "-c", text).strip()

    def pgbench(self, *options):
        self.run(self.client("pgbench"), "-h", self.socket, "-U", "postgres", *options, "postgres")

    def wal_end(self):
        return int(self.sql("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"))

    def make_wal(self, segments):
        """Realistic WAL until that many segments of 16 MiB are full; half wide inserts, half pgbench right after a
        checkpoint. Returns the end, a segment boundary, and the end of the last record before it."""
        begin, insert = self.wal_end(), True
        self.sql("CREATE TABLE IF NOT EXISTS ins (id bigint, name text, doc jsonb); CHECKPOINT")
        while self.wal_end() - begin < (segments - 1) * (16 << 20):
            if insert:
                self.sql("INSERT INTO ins SELECT i, md5(i::text), jsonb_build_object('key', md5((i * 7)::text), 'at', "
                         "i, 'text', repeat(md5((i * 13)::text), 2)) FROM generate_series(1, 60000) i")
            else:
                self.pgbench("-n", "-c", "4", "-j", "2", "-t", "3000")
            insert = not insert
        point = int(self.sql("SELECT pg_wal_lsn_diff(pg_create_restore_point('bench'), '0/0')"))
        self.sql("SELECT pg_switch_wal()")
        self.sql("CHECKPOINT")
        return self.wal_end() & ~((16 << 20) - 1), point

    def make_backlog(self, segments):
        """As much WAL as that many segments of 16 MiB, fast: one kind of record, hexadecimal text. Returns its end."""
        begin = self.wal_end()
        while self.wal_end() - begin < segments * (16 << 20):
            self.sql("DO $$ DECLARE piece text; BEGIN SELECT string_agg(md5(i::text), '') INTO piece FROM generate_series(1, "
                     "500000) i; FOR n IN 1..8 LOOP PERFORM pg_logical_emit_message(false, 'bench', piece); END LOOP; END $$")
        self.sql("SELECT pg_switch_wal()")
        return self.wal_end() & ~((16 << 20) - 1)

    # Regions, agent

    def start_endpoints(self):
        """Two empty S3 endpoints; what earlier ones held is gone."""
        self.stop_endpoints()
        for number in (1, 2):
            name = f"s3-{number}"
            tls = ("--tls-ca", self.authority(number)) if self.tls else ()
            self.endpoints.append(self.spawn(name, self.work / "bin/highwater-s3", "--bucket", "archive", "--key", KEY,
                                             "--secret", SECRET, *tls))
            wait(lambda name=name: (self.work / "log" / name).read_text().startswith("http"), 10, "an endpoint listens")

    def stop_endpoints(self):
        for process in self.endpoints:
            self.end(process)
        self.endpoints = []

    def authority(self, number):
        """Where an endpoint writes the certificate that it is to be trusted by."""
        return self.work / f"s3-{number}.pem"

    def endpoint(self, number):
        return (self.work / "log" / f"s3-{number}").read_text().split()[0]

    def configure(self, kind, slot="highwater", extra=""):
        """A configuration for `directory` or `s3`, empty regions included. Returns its path and the admin port."""
        if kind == "directory":
            regions = f'[[region]]\nname = "here"\nurl = "file://{self.fresh("archive")}"\n'
        else:
            self.start_endpoints()
            regions = "".join(f'[[region]]\nname = "region-{number}"\nurl = "s3://archive/bench"\n'
                              f'endpoint = "{self.endpoint(number)}"\n'
                              f'access_key_id = "{KEY}"\nsecret_access_key = "{SECRET}"\n'
                              + (f'ca_file = "{self.authority(number)}"\n' if self.tls else "")
                              for number in (1, 2))
        port = free_port()
        path = self.work / f"{kind}.toml"
        path.write_text(f'[cluster]\nname = "bench"\nconnection = "host={self.socket} user=highwater dbname=postgres"\n'
                        f'slot = "{slot}"\n{regions}[admin]\nlisten = "127.0.0.1:{port}"\n{extra}')
        path.chmod(0o600)
        self._own(path)
        return path, port

    def agent(self, config, *words):
        return [self.work / "bin/highwater-agent", "--config", config, *words]

    def restore(self, config, *words):
        return [self.work / "bin/highwater-restore", "--config", config, *words]

    def close(self):
        for process in list(self.running):
            self.end(process)
        with contextlib.suppress(RuntimeError):
            self.stop_cluster()


def free_port():
    for _ in range(50):
        port = random.randint(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port found")


def metric(port, name):
    """One number of the agent; None while it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    for line in text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    return None


def wait(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.02)


def size_of(directory):
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file() and not path.is_symlink())
