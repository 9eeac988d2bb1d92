"""A throw-away Slurm of two nodes on this machine: munged, slurmctld and two slurmd, as root, in a folder of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo", "setpriv")
SEARCH = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"  # where Debian keeps the daemons
NODES = ("node1", "node2")  # names that only Slurm can resolve, as on some clusters
CONFIG = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=debug Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def what_is_missing() -> str | None:
    """Why there can be no such Slurm here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: munge, slurm-wlm, util-linux)"
    return None if os.geteuid() == 0 else "needs root, as which the daemons of Slurm run"


class Slurm:
    """A running Slurm. `environment` is what its commands, and programs that call them, need.

    Attributes:
        folder: configuration, logs and state.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.environment = {**outer, "PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[tuple[str, subprocess.Popen]] = []

    def start(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        text = CONFIG.format(host=socket.gethostname().split(".")[0], ports=_free_ports(3), folder=self.folder)
        (self.folder / "slurm.conf").write_text(text)
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}",
                     f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
                     f"--seed-file={self.folder}/munged.seed")  # fmt: skip
        self._wait(lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False) == str(len(NODES)))

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--user=root", check=False)
            self._wait(lambda: not self.run("squeue", "-h", check=False), 20)
        for _, daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *words: str, check: bool = True, **settings) -> str:
        """What a command of Slurm prints."""
        settings = {"env": self.environment, "timeout": 60, **settings}
        process = subprocess.run(words, text=True, capture_output=True, **settings)
        assert process.returncode == 0 or not check, f"{words}: {process.stdout}{process.stderr}"
        return process.stdout.strip()

    def submit(self, *words: str, **settings) -> str:
        """The id of a job."""
        return self.run("sbatch", "--parsable", *words, **settings)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.details(job)["JobState"]

    def details(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def start_now(self, job: str) -> None:
        """Begin a job that was queued again, which has to wait for two minutes from the end of its earlier start."""
        deadline = time.monotonic() + 60
        self.wait_for(job, "PENDING", seconds=60)  # not COMPLETING: its nodes have done with the earlier start
        time.sleep(2)  # nodes compare whole seconds: a start in that of the kill is refused ("Job credential revoked")
        while self.state(job) in ("PENDING", "COMPLETING"):  # the two minutes are set late: an early change is lost
            assert time.monotonic() < deadline, self.details(job)
            self.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
            time.sleep(0.5)

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> str:
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds} s"
            time.sleep(0.2)
        return state

    def _daemon(self, name: str, *words: str) -> None:
        with open(self.folder / f"{'-'.join([name, *words[-1:]]).replace('/', '_')[:40]}.out", "wb") as log:
            command = ["setpriv", "--pdeathsig", "TERM", shutil.which(name, path=SEARCH), *words]  # gone also if the tests are killed
            self._daemons.append((name, subprocess.Popen(command, env=self.environment, stdout=log, stderr=log,
                                                         stdin=subprocess.DEVNULL, start_new_session=True)))  # fmt: skip

    def _wait(self, condition, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self._daemons if daemon.poll() is not None]
            logs = "".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.out"))
            assert not ended, f"{ended} ended: {logs}"
            assert time.monotonic() < deadline, logs
            time.sleep(0.1)


@contextlib.contextmanager
def throw_away_slurm() -> Iterator[Slurm]:
    """A running Slurm, gone at the end with its folder (a short path: sockets allow 107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
