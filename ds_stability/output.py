"""What a rank prints when nobody reads it any more.

`deepspeed` and ssh give a rank a pipe. When they are ended (SIGTERM to the launcher ends pdsh first, and the ranks are told
later), the next line printed would be a BrokenPipeError in the middle of a step, and its work lost. Here it is a wish to
stop instead, as by SIGTERM: a training finishes the step and saves (preemption.py).
"""

import io
import os
import signal
import stat
import sys

from ds_stability.launch_environment import is_rank


class _Pipe(io.FileIO):
    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except ConnectionError:  # EPIPE of a pipe, ECONNRESET of the socket that sshd may give instead
            unread = os.open(os.devnull, os.O_WRONLY)
            os.dup2(unread, self.fileno())
            os.close(unread)
            os.kill(os.getpid(), signal.SIGTERM)
            return len(memoryview(data).cast("B"))


def stop_when_unread() -> None:
    """Make the end of whoever reads stdout or stderr a SIGTERM to this process, where a launcher started it as a rank."""
    if not is_rank():
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or stream is None:
            continue  # a test has put its own there
        mode = os.fstat(stream.fileno()).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            stream.flush()
            raw = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True, write_through=True))
