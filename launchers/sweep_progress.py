"""What a sweep says while it runs: one line on a terminal, plain lines every 15 s elsewhere."""

import sys
import time
from pathlib import Path

from ds_stability.safe_read import parse_json

QUIET_SECONDS = 15  # between progress lines where there is no terminal
TAIL_BYTES = 16384  # more than a line of metrics.jsonl


def last_step(metrics: Path) -> int:
    """Step of the last whole line of a metrics.jsonl; 0 without one."""
    try:
        with open(metrics, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(parse_json(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return 0


class Progress:
    """Cells done, the current cell's step and rate, and the time left from what the finished cells took.

    Args:
        weights: how long each cell is, in optimizer steps (1 each where that is not known).
    """

    def __init__(self, weights: dict[str, int], stream=None):
        self.weights, self.stream = weights, stream or sys.stdout
        self.spent: dict[str, float] = {}  # cell id -> seconds it took
        self.done: set[str] = set()
        self.shown_at = float("-inf")

    def finish(self, cell: str, seconds: float | None) -> None:
        self.done.add(cell)
        if seconds is not None:
            self.spent[cell] = seconds

    def begin(self, cell: str) -> None:
        self.cell, self.started = cell, time.monotonic()
        self.first: tuple[int, float] | None = None  # (step, time) when a step was first seen

    def show(self, step: int) -> None:
        now = time.monotonic()
        if step and self.first is None:
            self.first = (step, now)
        self.update(self.line(step, now), now)

    def update(self, text: str, now: float | None = None) -> None:
        """Show a line that the next one may replace."""
        now = time.monotonic() if now is None else now
        if not self.stream.isatty() and now - self.shown_at < QUIET_SECONDS:
            return
        self.shown_at = now
        self._print(text, end="" if self.stream.isatty() else "\n")

    def say(self, text: str) -> None:
        self._print(text, end="\n")

    def line(self, step: int, now: float) -> str:
        head = f"[{len(self.done)}/{len(self.weights)} done] {self.cell}"
        rest = self.left(now)
        tail = "" if rest is None else f"  {clock(rest)} left in all"
        if self.first is None or step <= self.first[0]:
            return f"{head}  {f'step {step}' if step else 'starting'}, {now - self.started:.0f} s{tail}"
        rate = (step - self.first[0]) / (now - self.first[1])
        steps = f"{step}/{self.weights[self.cell]}" if self.weights[self.cell] > 1 else str(step)
        return f"{head}  step {steps}  {rate:.1f} steps/s{tail}"

    def left(self, now: float) -> float | None:
        """Seconds to the end if the cells that are left are trained one after the other; None before one has finished."""
        measured = sum(self.weights[cell] for cell in self.spent)
        if not measured:
            return None
        per_weight = sum(self.spent.values()) / measured
        rest = sum(weight for cell, weight in self.weights.items() if cell not in self.done) * per_weight
        return max(0.0, rest - (now - self.started))

    def _print(self, text: str, end: str) -> None:
        # On a terminal each line covers the one before it.
        start = "\r\033[K" if self.stream.isatty() else ""
        print(start + text, end=end, file=self.stream, flush=True)


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
