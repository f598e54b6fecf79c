"""Running one command and saying what it cost: time, CPU of it and of everything it started, peak memory.

Owns: the command's process tree, detached processes included (the meter is their subreaper, so a program that
forks itself away, as pgBackRest's asynchronous workers do, is counted and waited for).
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass
class Cost:
    """What one run cost."""

    wall: float
    cpu: float
    peak: int  # bytes of the largest process; 0 when that was not more than this program has itself
    server: float = 0.0  # CPU seconds of PostgreSQL and of the S3 endpoints meanwhile
    stolen: float = 0.0  # share of the processors' time that the machine's host gave to others meanwhile
    stored: int = 0  # bytes in one region or directory afterwards
    notes: dict = field(default_factory=dict)


def _metered(command, account, log, pipe, environment, directory):
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = time.monotonic()
    with open(log, "ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=directory,
                                   env=environment, **account)
    os.write(pipe, f"{process.pid}\n".encode())
    codes = []
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            break
        if pid == process.pid:
            codes.append(os.waitstatus_to_exitcode(status))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Linux counts the memory of the process that forked, until exec, as the child's.
    own = max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 20 << 10)
    result = {"wall": time.monotonic() - started, "cpu": used.ru_utime + used.ru_stime,
              "peak": used.ru_maxrss * 1024 if used.ru_maxrss > own else 0, "code": codes[0] if codes else -1}
    os.write(pipe, json.dumps(result).encode())


def measure(command, account, log, environment, directory, until=None, accept=(0,), limit=1800):
    """Runs `command` to its end, or until `until()` is true and then to its end after SIGTERM.

    With `until`, the wall time is the time until it was true (at most `limit` seconds); the CPU time is that of
    the whole run.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            _metered([str(word) for word in command], account, log, writing, environment, directory)
            code = 0
        except OSError as error:
            print(f"bench: {command[0]}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    os.close(writing)
    started, reached, pid = time.monotonic(), None, None
    try:
        with os.fdopen(reading) as answers:
            pid = int(answers.readline() or 0)
            while until and pid and reached is None and os.path.exists(f"/proc/{pid}"):
                if until():
                    reached = time.monotonic() - started
                    os.kill(pid, signal.SIGTERM)
                elif time.monotonic() - started > limit:
                    os.kill(pid, signal.SIGKILL)
                    break
                else:
                    time.sleep(0.05)  # asking is work for the command, too
            text = answers.read()
    except BaseException:
        if pid:
            os.kill(pid, signal.SIGTERM)
        raise
    finally:
        os.waitpid(child, 0)
    result = json.loads(text or "{}")
    if not result or (result["code"] not in accept) or (until and reached is None):
        with open(log, errors="replace") as said:
            last = "".join(said.readlines()[-12:])
        raise RuntimeError(f"{' '.join(map(str, command[:3]))} ... failed ({result.get('code')}); it said:\n{last}")
    return Cost(wall=reached or result["wall"], cpu=result["cpu"], peak=result["peak"])


TICK = os.sysconf("SC_CLK_TCK")


def stolen_seconds():
    """Seconds that the host has given to others although a processor of this machine had something to do: proc_stat(5)."""
    with open("/proc/stat") as stat:
        return int(stat.readline().split()[8]) / TICK


def _times(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))


def cpu_of(pids):
    """CPU seconds of these processes, their living children and those that they have waited for."""
    total = 0
    for pid in pids:
        _, own, waited = _times(pid)
        total += own + waited
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent, own, _ = _times(entry)
            except OSError:
                continue
            if parent in pids:
                total += own
    return total / TICK
