"""How a script of ours is started under the `deepspeed` launcher: on this machine, or on the hosts of a hostfile.

Success of a training is its DONE file, not an exit code: DeepSpeed on CPU now and then hangs or aborts after all work is
done.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_stability.errors import UserError
from ds_stability.shared_memory import remove_abandoned

HERE = Path(__file__).resolve().parent
TRAIN_SCRIPT = HERE / "train.py"
EVAL_SCRIPT = HERE.parent / "eval" / "run.py"
POLL_SECONDS = 0.5
GRACE_SECONDS = 10  # between SIGTERM and SIGKILL
TEARDOWN_SECONDS = 60  # for a training that has DONE to end by itself


@dataclass(frozen=True)
class Hosts:
    """Where a cell is trained: `processes` on this machine, or all slots of a hostfile (by pdsh, as `deepspeed` does)."""

    processes: int
    hostfile: str | None = None

    def command(self, script: Path, words: Sequence[str], port: int) -> list[str]:
        """The launcher's command line. UserError if it would reach the hosts' shells as something else."""
        where = ["--hostfile", self.hostfile] if self.hostfile else ["--num_gpus", str(self.processes)]
        tail = [str(script), *words]
        if self.hostfile and len(read_hostfile(self.hostfile)) > 1:  # with one host DeepSpeed starts it without pdsh
            _require_plain_surroundings()
            tail = [_percent(shlex.quote(str(script))), *map(pdsh_word, words)]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(port), *tail]


def pdsh_word(word: str) -> str:
    """A word for `deepspeed --hostfile`, such that the script on the hosts gets it as it is.

    pdsh gives all words to a shell there. DeepSpeed (PDSHRunner.parse_user_args) puts one with a blank in double quotes and
    escapes only the double quotes in it; any other goes as it is.
    """
    if " " in word:
        for character in "\\$`":
            word = word.replace(character, "\\" + character)
        return _percent(word)
    return _percent(shlex.quote(word))


def _percent(text: str) -> str:
    return text.replace("%", "%%")  # pdsh replaces %h, %n and %u


def _require_plain_surroundings() -> None:
    """What DeepSpeed itself writes into the hosts' shell line, and does not quote."""
    parts = {"the current folder": os.getcwd(), "the interpreter": sys.executable, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    for what, text in parts.items():
        if not re.fullmatch(r"[\w@+=:,./-]*", text):
            raise UserError(f"--hostfile: {what} is {text!r}, which DeepSpeed does not quote on its way to the hosts; allowed are "
                            "letters, digits and @ + = : , . / - _")  # fmt: skip


def read_hostfile(hostfile: str) -> dict[str, int]:
    """{host: slots} of a hostfile (`name slots=N` a line). UserError if it is none."""
    try:
        lines = Path(hostfile).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {hostfile}: cannot be read ({error})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if words:
            match = re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.@-]*) slots=([1-9][0-9]{0,5})", " ".join(words))
            if match is None:
                raise UserError(f"--hostfile {hostfile}, line {number}: {line!r}; allowed is HOST slots=N")
            if match[1] in hosts:
                raise UserError(f"--hostfile {hostfile}, line {number}: {match[1]} is there twice; give it one line with all its slots")
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"--hostfile {hostfile}: names no host; allowed are lines of HOST slots=N")
    return hosts


def count_slots(hostfile: str) -> int:
    """Sum of the slots in a hostfile. UserError if it is none."""
    return sum(read_hostfile(hostfile).values())


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came; no Exception, as KeyboardInterrupt is none: a handler must not take it for a failure."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.exit_code = 128 + signum


class _Signals:
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    caught: int | None = None
    shielded = False

    def handle(self, signum: int, frame: Any) -> None:
        for kind in self.kinds:
            signal.signal(kind, signal.SIG_IGN)  # a second one must not disturb the ending of the children
        self.caught = signum
        if not self.shielded:
            raise Interrupted(signum)


_signals = _Signals()  # a process has one set of signal handlers


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Interrupted, once."""
    _signals.caught = None
    before = {kind: signal.signal(kind, _signals.handle) for kind in _signals.kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """Let Interrupted wait until the end of the block: between fork and the return of Popen nobody knows the child."""
    _signals.shielded = True
    try:
        yield
    finally:
        _signals.shielded = False
    if _signals.caught is not None:
        raise Interrupted(_signals.caught)


def run_script(hosts: Hosts, script: Path, words: Sequence[str], log: Path,
               watch: Callable[[], bool] = lambda: False, keep_open: Sequence[int] = ()) -> int | None:  # fmt: skip
    """Run a script under the launcher with its output in the file `log`; its exit code (None if it had to be ended).

    It runs in a session of its own, so that it can be ended with its ranks and nothing else, and so that it survives a
    SIGKILL of this process. However this function is left, no process of the script is left on this machine.

    Args:
        watch: called every POLL_SECONDS; True once the script has done its work, and may be ended after TEARDOWN_SECONDS.
        keep_open: descriptors of locks that the launcher holds as well.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    process = None
    with open(log, "wb") as stream:
        try:
            with _shielded():
                process = subprocess.Popen(hosts.command(script, words, port), stdout=stream, stderr=subprocess.STDOUT,
                                           stdin=subprocess.DEVNULL, env=environment(), start_new_session=True,
                                           pass_fds=tuple(keep_open))  # fmt: skip
            ended = _wait(process, watch)
        finally:
            if process is not None:
                end_session(process)
            remove_abandoned(port)
    return process.returncode if ended else None


def _wait(process: subprocess.Popen, watch: Callable[[], bool]) -> bool:
    """Whether the process ended by itself."""
    finished_at = None
    while not _ends_within(process, POLL_SECONDS):
        if watch():
            finished_at = finished_at or time.monotonic()
            if time.monotonic() - finished_at > TEARDOWN_SECONDS:
                return False
    return True


def _ends_within(process: subprocess.Popen, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (ended := has_ended(process)) and time.monotonic() < deadline:
        time.sleep(0.02)  # the next cell waits for this one's end
    return ended


def has_ended(process: subprocess.Popen) -> bool:
    """As poll(), but the process is left a zombie: until it is waited for, its id cannot become another group's."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_session(process: subprocess.Popen) -> None:
    """End a process and all of its session's group: SIGTERM, and SIGKILL for what is left."""
    deadline = time.monotonic() + GRACE_SECONDS
    if not has_ended(process):
        os.killpg(process.pid, signal.SIGTERM)
    while not has_ended(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # ranks that outlive their launcher
    process.wait()


def environment() -> Mapping[str, str]:
    """This environment; without a GPU on DeepSpeed's CPU accelerator, one thread a rank unless OMP_NUM_THREADS says more."""
    values = dict(os.environ)
    if not on_gpu():
        values.setdefault("DS_ACCELERATOR", "cpu")
        values.setdefault("OMP_NUM_THREADS", "1")
    return values


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def default_processes() -> int:
    """2 ranks, or the one GPU of a machine that has one."""
    import torch

    return min(2, torch.cuda.device_count()) if on_gpu() else 2


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
