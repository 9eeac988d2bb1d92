"""Two hosts on one machine: Linux namespaces joined by a veth pair, an sshd in each, `deepspeed --hostfile` over pdsh.

A host is a process tree in namespaces of its own (network, processes, mounts, host name, IPC), with its own /dev/shm, /run
and /etc/hosts, and the machine's other files: what nodes with a shared file system are. Nothing of it has a name on the
machine, and it ends with its first process, which the kernel kills when the test's process is gone: teardown needs no luck.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # of the pair's own network: no other can see it
TOOLS = {"pdsh": "pdsh", "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "ip": "iproute2",
         "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}  # fmt: skip
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# $1 its name, $2 the folder with the key.
BOOT = """set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$2/hosts" /etc/hosts
hostname "$1"
ip link set lo up
exec "$(command -v sshd)" -D -e -f /dev/null -h "$2/key" -o AuthorizedKeysFile="$2/key.pub" -o StrictModes=no -o UsePAM=no \
    -o PidFile=none -o PasswordAuthentication=no -o ClientAliveInterval=5 -o ClientAliveCountMax=3
"""


def missing() -> str | None:
    """What two hosts lack on this machine, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts need root on Linux (network namespaces)"
    lacking = [f"{tool} (Debian: {package})" for tool, package in TOOLS.items() if shutil.which(tool, path=PATH) is None]
    if lacking:
        return f"two hosts need {', '.join(lacking)}"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "eth0", "type", "veth", "peer", "eth1"],
                           capture_output=True, text=True, env={"PATH": PATH})  # fmt: skip
    return None if probe.returncode == 0 else f"two hosts need network namespaces and veth: {probe.stderr.strip()}"


@dataclass
class Host:
    name: str
    outside: subprocess.Popen  # `unshare`, whose end is the host's end
    first: int  # process id, seen from the machine, of the host's first process
    home: str  # where commands run

    def enter(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.first), "--net", "--mount", "--pid", "--uts", "--ipc", "--", "env", "--chdir", self.home, *words]

    def link(self, state: str) -> None:
        """Pull the cable ("down"), or put it back ("up")."""
        _ip("link", "set", "eth0", state, host=self.first)

    def processes(self) -> dict[int, str]:
        """{process id, seen from the machine: command} of all that runs here, sshd left out."""
        space, found = os.stat(f"/proc/{self.first}/ns/pid").st_ino, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.stat(folder / "ns/pid").st_ino == space and (words := (folder / "cmdline").read_bytes()):
                    found[int(folder.name)] = words.replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # it has just ended, or it is the machine's and may not be looked at
                continue
        return {pid: command for pid, command in found.items() if "sshd" not in command.split()[0]}

    def rank(self, number: int) -> int:
        """Process id of the rank with this global number, which must run here."""
        for pid, command in self.processes().items():
            try:
                if "--local_rank=" in command and f"\0RANK={number}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    return pid
            except OSError:
                continue
        raise LookupError(f"no rank {number} on {self.name}: {self.processes()}")


def _ip(*words: str, host: int | None = None) -> None:
    enter = [] if host is None else ["nsenter", "--target", str(host), "--net", "--"]
    subprocess.run([*enter, "ip", *words], check=True, capture_output=True, env={"PATH": PATH})


class TwoHosts:
    """`hosts.start(script, *args, slots=1)` runs `deepspeed --hostfile` on the first host, over both, through pdsh.

    Args:
        folder: an empty one, for key, hostfiles and logs.
        extensions: DeepSpeed's compiled operators; the hosts share it as they would on a shared file system.
    """

    def __init__(self, folder: Path, extensions: str):
        self.folder, self.hosts = folder, []
        self._ports, self._runs = itertools.count(29500), itertools.count()  # ports in the hosts' own network
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        lines = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        # A remote rank gets what is listed here, and variables that start with PYTHON, MLFLOW, MV2 or UCX.
        values = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": extensions, "GLOO_SOCKET_IFNAME": "eth0",
                  "TOKENIZERS_PARALLELISM": "false", "PATH": f"{Path(sys.executable).parent}:{PATH}"}  # fmt: skip
        (folder / "env").write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        self.environment = {
            **os.environ, **values, "DS_ENV_FILE": str(folder / "env"), "PYTHONPATH": str(REPOSITORY), "PDSH_RCMD_TYPE": "ssh",
            # -F: not the machine's ssh config. ServerAlive: without it pdsh waits for a host that is gone, for ever.
            "PDSH_SSH_ARGS_APPEND": f"-F /dev/null -i {folder / 'key'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
                                    "-o LogLevel=ERROR -o ServerAliveInterval=5 -o ServerAliveCountMax=3",
        }  # fmt: skip

    def boot(self) -> None:
        for name in NAMES:
            command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork",
                       "--mount-proc", "--kill-child", "sh", "-c", BOOT, "sh", name, str(self.folder)]  # fmt: skip
            with open(self.folder / f"{name}.log", "w") as log:
                outside = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "PATH": PATH})
            self.hosts.append(Host(name, outside, 0, str(self.folder)))
        for host in self.hosts:
            children = Path(f"/proc/{host.outside.pid}/task/{host.outside.pid}/children")
            _until(lambda host=host, children=children: children.exists() and children.read_text().strip()
                   and "listening" in (self.folder / f"{host.name}.log").read_text(), self.folder)  # fmt: skip
            host.first = int(children.read_text().split()[0])
        first, second = (host.first for host in self.hosts)
        _ip("link", "add", "eth0", "netns", str(first), "type", "veth", "peer", "name", "eth0", "netns", str(second))
        for host, address in zip(self.hosts, ADDRESSES, strict=True):
            _ip("addr", "add", f"{address}/24", "dev", "eth0", host=host.first)
            host.link("up")

    def start(self, script: Path, *words: str, slots: int = 1, rank_logs: bool = True) -> "Run":
        """Start a script on `slots` processes of each host. Without `rank_logs` the ranks print through ssh, as is usual."""
        hostfile, logs = self.folder / f"hostfile-{slots}", self.folder / f"ranks-{next(self._runs)}"
        hostfile.write_text("".join(f"{name} slots={slots}\n" for name in NAMES))
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh_check", "--master_addr",
                   ADDRESSES[0], "--master_port", str(next(self._ports)),
                   *(["--enable_each_rank_log", str(logs)] if rank_logs else []), str(script), *map(str, words)]  # fmt: skip
        with open(logs.with_suffix(".log"), "w") as output:
            process = subprocess.Popen(self.hosts[0].enter(*command), env=self.environment, stdout=output,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        return Run(self, process, logs)

    def shell(self, command: str) -> str:
        """What a shell command prints on both hosts, each line after its host's name."""
        words = self.hosts[0].enter("pdsh", "-w", ",".join(NAMES), command)
        return subprocess.run(words, env=self.environment, check=True, capture_output=True, text=True, timeout=30).stdout

    def run(self, script: Path, *words: str, slots: int = 1, timeout: float = 240) -> "Run":
        """As `start`, and wait for the end of every process of it."""
        run = self.start(script, *words, slots=slots)
        run.wait(timeout)
        return run

    @contextlib.contextmanager
    def cut(self):
        """The network between the hosts is down meanwhile; afterwards both can reach each other again."""
        self.hosts[1].link("down")
        try:
            yield
        finally:
            self.hosts[1].link("up")

    def survivors(self) -> dict[str, dict[int, str]]:
        """What runs on the hosts, sshd left out; {} when nothing does."""
        return {host.name: left for host in self.hosts if (left := host.processes())}

    def clear(self) -> None:
        """End whatever runs on the hosts."""
        for left in self.survivors().values():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def shut_down(self) -> None:
        for host in self.hosts:
            host.outside.kill()
            host.outside.wait()


@dataclass
class Run:
    """A `deepspeed --hostfile` that was started. `logs`: a folder with a file for every rank, seen by both hosts."""

    hosts: TwoHosts
    process: subprocess.Popen
    logs: Path

    def launcher(self) -> int:
        """Process id of `deepspeed` itself, which runs on the first host."""
        return next(pid for pid, command in self.hosts.hosts[0].processes().items() if "-m deepspeed.launcher.runner" in command
                    and not command.startswith("nsenter"))  # fmt: skip

    def wait(self, timeout: float) -> int:
        """The launcher's exit code, once no process is left on either host; the test fails after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None or self.hosts.survivors():
            if time.monotonic() > deadline:
                left, text = self.hosts.survivors(), self.text()
                self.hosts.clear()
                self.process.kill()
                self.process.wait()
                pytest.fail(f"after {timeout} s there still run {left}\n{text}")
            time.sleep(0.1)
        return self.process.returncode

    def rank_text(self, rank: int) -> str:
        """What a rank has printed."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.logs.glob(f"*_rank{rank}.log")))

    def text(self) -> str:
        """The end of all that was printed, by the launcher and by every rank."""
        ranks = [f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.logs.glob("*.log"))]
        return "\n".join([self.launcher_text()[-3000:], *ranks])

    def launcher_text(self) -> str:
        return self.logs.with_suffix(".log").read_text(errors="replace")


def _until(condition, folder: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("the hosts do not start: " + " ".join(path.read_text() for path in folder.glob("*.log")))
        time.sleep(0.05)


@contextlib.contextmanager
def two_hosts(folder: Path, extensions: str):
    """Two hosts, for a fixture; its tests are skipped, and told why, where they cannot be had. Arguments as of TwoHosts."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    hosts = TwoHosts(folder, extensions)
    try:
        hosts.boot()
        yield hosts
    finally:
        hosts.shut_down()
