"""A SLURM controller with two nodes on this machine, for as long as a test needs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
SETTINGS = """
ClusterName=ltrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES State=UP OverSubscribe=YES MaxTime=30
"""


def missing() -> str | None:
    """Why no controller can be started here, None where one can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd must be started as root"


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """Runs SLURM's commands against the controller of this test."""

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        self.folder = folder
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, env={**self.environment, **more}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The controller's record of a job."""
        text = self.run("scontrol", "show", "job", number, "-o")
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait(self, number: str, states: tuple[str, ...], limit_s: float = 180) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        give_up = time.monotonic() + limit_s
        while True:
            record = self.job(number)
            if record["JobState"] in states:
                return record
            assert time.monotonic() < give_up, f"job {number} is still {record}"
            time.sleep(0.5)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A controller and two nodes; their processes end with the context."""
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(3)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(SETTINGS.format(host=host, ports=ports, folder=folder))
    for node in ("n1", "n2"):
        (folder / f"spool-{node}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    found = Cluster(folder)
    daemons = [
        [
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"),
            *(f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid"),
            f"--seed-file={folder}/munged.seed",
        ],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    started = []
    try:
        for i, command in enumerate(daemons):
            log = (folder / f"daemon-{i}.txt").open("w")
            started.append(subprocess.Popen(command, env=found.environment, stdout=log, stderr=log))
            time.sleep(0.5)
        _until_idle(found)
        yield found
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _until_idle(found: Cluster) -> None:
    give_up = time.monotonic() + 60
    while True:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"], env=found.environment, capture_output=True, text=True
        )
        if done.stdout.count(" idle") == 2:
            return
        logs = "\n".join(p.read_text()[-1500:] for p in sorted(found.folder.glob("*.[lt][ox][gt]")))
        assert time.monotonic() < give_up, f"nodes do not come up: {done.stdout}{done.stderr}\n{logs}"
        time.sleep(0.5)
