"""SIGTERM and SIGUSR1 as a wish to stop: finish the step, save, leave with exit code 75.

A signal reaches one rank, or the ranks of one host, at any moment; all must stop after the same step. The wish therefore
rides in the step's one all-reduce (statistics.py, `stop_requests`; collective.py says which steps have none), and `Stability.stop_requested` is the answer that all
ranks share. The interpreter runs Python handlers only between bytecodes, which a rank that waits in a collective never
reaches. So the C-level handler writes to a pipe (signal.set_wakeup_fd), and a thread reads it.
"""

import os
import select
import signal
import sys
import threading

from ds_stability.siblings import ended_ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOOK_AGAIN_SECONDS = 1.0
LOST_SIBLING = 128 + signal.SIGTERM  # what a shell reports for a process that SIGTERM ended


class StopSignals:
    """What this process was asked to do; make one per process, on the main thread, with `install`.

    Attributes:
        received: the first signal's name, None before.
        exit_code: with which to leave if the launcher hurries us; 75 once the stopped run is saved.
    """

    def __init__(self):
        self.received: str | None = None
        self.exit_code = LOST_SIBLING
        self._pipe: tuple[int, int] | None = None

    def install(self) -> "StopSignals":
        """Take over SIGTERM and SIGUSR1 of this process; children that it forks get the default back."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)  # set_wakeup_fd wants this: a full pipe must not block a handler
        for number in SIGNALS:
            signal.signal(number, _noted_elsewhere)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()
        os.register_at_fork(after_in_child=_in_child)
        return self

    def _watch(self) -> None:
        wanted = {int(number): number.name for number in SIGNALS}
        while True:
            # Once asked to stop, look again and again: a rank may be lost in the meantime.
            select.select([self._pipe[0]], [], [], LOOK_AGAIN_SECONDS if self.received else None)
            _hurried(self.exit_code)
            for byte in os.read(self._pipe[0], 64) if select.select([self._pipe[0]], [], [], 0)[0] else b"":
                self.received = self.received or wanted.get(byte)


def _hurried(exit_code: int) -> None:
    """Leave now, if a rank of this host has ended: no step will ever end, and this is the launcher clearing up.

    DeepSpeed's launcher names the host's last rank, whichever ended; the first one that is left names the right ones.
    """
    ended = ended_ranks()
    if not ended:
        return
    if exit_code == LOST_SIBLING and int(os.environ["LOCAL_RANK"]) == min(set(range(len(ended) + 1)) - _local(ended)):
        print(f"error: rank {os.environ['RANK']}: rank {', '.join(map(str, ended))} of this host has ended; so does this one",
              file=sys.stderr, flush=True)  # fmt: skip
    os._exit(exit_code)


def _local(ranks: list[int]) -> set[int]:
    first = int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"])
    return {rank - first for rank in ranks}


def _noted_elsewhere(number, frame) -> None:
    """The thread reads the signal from the pipe; a Python handler must exist for that."""


def _in_child() -> None:
    """A forked child (a data loader's worker) ends by SIGTERM, as any process does, but ignores SIGUSR1.

    A batch system sends SIGUSR1 to a whole process group, and the rank needs its workers to finish the step.
    """
    ours = signal.getsignal(signal.SIGUSR1) is _noted_elsewhere
    release_signals()
    if ours:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def release_signals() -> None:
    """Die of these signals again, as any process does: when all is lost.

    On the main thread; does nothing where `install` was not called.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is _noted_elsewhere:
            signal.set_wakeup_fd(-1)
            signal.signal(number, signal.SIG_DFL)
