"""Kill a random rank at a random moment, see that the run ends and says so, start it again, and compare with a run that
nobody disturbed.

    python tests/faults/driver.py --trials 30 --output runs/faults
    python tests/faults/driver.py --output runs/faults --render docs/reliability.md

Trials come in chains: a run loses a rank, is started again, loses another one, ...; after the last it must come to the
same bytes as the undisturbed run. Which rank, phase, moment and delay follow from --seed. Each trial is a line of
OUTPUT/trials.jsonl; a driver that was broken off goes on with the chains that are not there. OUTPUT/faults.json sums up,
and is what docs/results/ holds. Exit code 1 if any trial failed.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests")]

import fault_processes as processes  # noqa: E402
from fault_runs import KINDS, Moment  # noqa: E402
from ports import free_port  # noqa: E402

from ds_stability.run_dir import git_revision, write_atomic, write_json_atomic  # noqa: E402
from ds_stability.shared_memory import remove_abandoned  # noqa: E402

RANKS = 2
END_SECONDS = 60.0  # within which every process of a run that has lost a rank must have ended
RUN_SECONDS = 240.0  # for a moment to come, or for a run to be done
LONGEST_DELAY = {"checkpoint": 0.1, "probing": 0.15}  # seconds between the beginning of a phase and the kill
OTHER_DELAY = 0.3
LOOK_SECONDS = 0.5
CYCLE = (("training", 3), ("evaluation", 2), ("training", 3), ("sweep", 2))  # kinds and lengths of chains
PHASES = {"training": "training", "checkpoint": "checkpoint writing", "probing": "probing", "evaluation": "evaluation",
          "sweep": "sweep"}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One kill. `position`: which one of its chain, from 0."""

    number: int
    phase: str
    position: int
    rank: int
    delay: float  # seconds after the moment
    seed: str


@dataclass(frozen=True)
class Chain:
    kind: str
    trials: list[Trial]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.trials[0].number:03d}"


def plan(count: int, seed: int, cycle=CYCLE) -> list[Chain]:
    """`count` trials in chains; the same for the same arguments."""
    chains, number = [], 0
    while number < count:
        for kind, length in cycle:
            size = min(length, count - number)
            if size == 0:
                break
            draw = random.Random(f"{seed}/{number}")
            phases = list(KINDS[kind].phases) * (length // len(KINDS[kind].phases))
            draw.shuffle(phases)
            trials = [Trial(number + position, phases[position], position, draw.randrange(RANKS),
                            round(draw.uniform(0, LONGEST_DELAY.get(phases[position], OTHER_DELAY)), 3), f"{seed}/{number + position}")
                      for position in range(size)]  # fmt: skip
            chains.append(Chain(kind, trials))
            number += size
    return chains


class Attempt:
    """One start of a run, up to its end or to the loss of a rank."""

    def __init__(self, run: Any, output: Path, log: Path, environment: dict[str, str], **changed: object):
        self.run, self.output, self.log, self.marker = run, output, log, uuid.uuid4().hex
        self.port = free_port()
        self.process = processes.start(run.command(output, self.port, **changed), self.marker, log, environment)

    def wait_for(self, moment: Moment, rank: int = 0) -> psutil.Process | None:
        """The process of `rank` as soon as the moment has come; None if the run ended before."""
        deadline, looked, process = time.monotonic() + RUN_SECONDS, -LOOK_SECONDS, None
        while True:
            come = moment.come()
            if process is not None and not processes.alive(process):
                process = None  # of a sweep's cell that is done
            # Looked for beforehand: it takes as long as a small checkpoint.
            if process is None and (come or time.monotonic() - looked > LOOK_SECONDS):
                looked, process = time.monotonic(), processes.rank_process(self.marker, rank)
            if come or self.process.poll() is not None:
                return process if come else None
            if time.monotonic() > deadline:
                raise TimeoutError(f"{moment.words} did not come within {RUN_SECONDS:.0f} s\n{self.text()[-3000:]}")
            time.sleep(0.01)

    def wait_until_ended(self) -> str:
        """Until no process of the run is left, or RUN_SECONDS are over; what was printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(RUN_SECONDS)
        if processes.seconds_to_end(processes.processes_of(self.marker), END_SECONDS) is None:
            self.clear()
            raise TimeoutError(f"the run did not end\n{self.text()[-3000:]}")
        self.clear()
        return self.text()

    def wait_until_done(self) -> None:
        """Until the run has written DONE and its processes have ended."""
        self.wait_until_ended()
        if not self.run.done(self.output):
            raise RuntimeError(f"the run did not come to its end (exit code {self.process.returncode})\n{self.text()[-3000:]}")

    def strike(self, victim: psutil.Process, trial: Trial, moment: Moment) -> dict[str, Any]:
        """Kill the rank, and watch what becomes of the rest."""
        session = _session(victim)
        time.sleep(trial.delay)
        if session is None or not processes.alive(victim):
            return {}
        inside, started = moment.inside(), time.monotonic()
        victim.kill()
        # Of a sweep only this cell's launch: the sweep itself goes on.
        doomed = [process for process in processes.processes_of(self.marker) if _session(process) == session]
        ended = processes.seconds_to_end(doomed, END_SECONDS) is not None
        seconds = round(time.monotonic() - started, 2)
        if ended and not self.run.lives_on:
            ended = not processes.processes_of(self.marker)
        if not ended:
            processes.end_all(self.marker)
        return {"struck": True, "inside": inside, "seconds": seconds if ended else None,
                "exit_code": None if self.run.lives_on else self.process.wait()}  # fmt: skip

    def text(self) -> str:
        """Everything that was printed."""
        return "".join(path.read_text(errors="replace") for path in self.run.logs(self.output, self.log))

    def clear(self) -> None:
        """Nothing of this attempt stays behind, nor what DeepSpeed leaves in shared memory."""
        processes.end_all(self.marker)
        self.process.wait()
        remove_abandoned(self.port)


def naming_line(text: str, rank: int) -> str | None:
    """The line that says which rank was lost: ours, or the launcher's."""
    ours = re.compile(rf"\brank (\d+, )*{rank}(, \d+)* of this host has ended|\blost (contact with )?rank (\d+, )*{rank}\b")
    # It names the host's last rank, whichever was lost (deepspeed/launcher/launch.py, sigkill_handler).
    launcher = re.compile(rf"--local_rank={rank}\b.*exits with return code = -9")
    for pattern in (ours, launcher):
        for line in text.splitlines():
            if pattern.search(line):
                return line.strip()[:300]
    return None


class Driver:
    """Runs chains in a folder; the undisturbed runs are made once and kept there."""

    def __init__(self, output: Path, seed: int = 0):
        self.output, self.seed = output.resolve(), seed
        self.shared, self.journal = self.output / "shared", self.output / "trials.jsonl"
        self.shared.mkdir(parents=True, exist_ok=True)
        self.runs: dict[str, Any] = {}
        self.expected: dict[str, dict[str, bytes]] = {}
        extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(self.output / "torch_extensions"))
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        self.environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
                            "TORCH_EXTENSIONS_DIR": extensions}  # fmt: skip

    def undisturbed(self, kind: str) -> dict[str, bytes]:
        """What a run that nobody disturbs leaves; it is made at the first call."""
        if kind not in self.expected:
            run, folder = KINDS[kind](self.shared), self.undisturbed_folder(kind)
            if not run.done(folder):
                run.prepare()
                Attempt(run, folder, self.shared / f"{kind}.log", self.environment).wait_until_done()
            self.runs[kind], self.expected[kind] = run, run.results(folder)
        return self.expected[kind]

    def undisturbed_folder(self, kind: str) -> Path:
        return self.shared / f"undisturbed-{kind}"

    def chain(self, chain: Chain) -> list[dict[str, Any]]:
        """Run a chain and append its trials to the journal; the records."""
        expected, run, started = self.undisturbed(chain.kind), self.runs[chain.kind], time.monotonic()
        output = self.output / chain.name
        shutil.rmtree(output, ignore_errors=True)
        records, attempts = [], []
        kept = b""

        def attempt() -> Attempt:
            attempts.append(Attempt(run, output, self.output / "logs" / f"{chain.name}.{len(attempts)}.log", self.environment))
            return attempts[-1]

        try:
            for trial in chain.trials:
                current = attempts[-1] if attempts and run.lives_on else attempt()
                records.append(self._trial(trial, current, run, output, kept))
                if records[-1]["seconds"] is None:
                    break  # nobody was killed, or the rest did not end
                kept = run.kept(output)
            if not run.lives_on:
                attempt()
            attempts[-1].wait_until_done()
            same = differences(run.results(output), expected) + ([] if run.keeps(output, kept) else ["progress was lost"])
        except (OSError, RuntimeError) as error:
            same = [str(error)]
        finally:
            for each in attempts:
                each.clear()
        share = round((time.monotonic() - started) / len(records), 1) if records else 0.0
        git = git_revision(REPOSITORY) or {"revision": None, "dirty": True}
        for record in records:
            record |= {"differences": same, "trial_seconds": share, **git}
            record["passed"] = passed(record)
        with open(self.journal, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        if all(record["passed"] for record in records):
            shutil.rmtree(output)
        return records

    def _trial(self, trial: Trial, attempt: Attempt, run: Any, output: Path, kept: bytes) -> dict[str, Any]:
        moment = run.moment(output, trial.phase, trial.position, random.Random(trial.seed))
        record = {"trial": trial.number, "phase": trial.phase, "rank": trial.rank, "moment": moment.words, "delay": trial.delay}
        record |= {"struck": False, "inside": False, "seconds": None, "named": None, "kept": False}
        try:
            victim = attempt.wait_for(moment, trial.rank)
        except TimeoutError as error:
            return record | {"error": str(error)}
        if victim is not None:
            record |= attempt.strike(victim, trial, moment)
        text = "".join(path.read_text(errors="replace") for path in run.logs(output, attempt.log, trial.position))
        record |= {"named": naming_line(text, trial.rank), "kept": run.keeps(output, kept)}
        return record if run.lives_on else record | {"resumes_at": run.resumes_at(output)}


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Names of the files that are not the same, or are there only once."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def passed(record: dict[str, Any]) -> bool:
    return bool(record["struck"] and record["seconds"] is not None and record["named"] and record["kept"]
                and not record["differences"])  # fmt: skip


def read_trials(journal: Path) -> dict[int, dict[str, Any]]:
    """Records by trial, of a trial that stands there twice the last."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    return {record["trial"]: record for record in map(json.loads, lines)}


def summary(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """faults.json."""
    import common

    settings = {"trials": len(records), "ranks": RANKS, "launcher": "deepspeed"}
    head = common.describe_measurement("faults", {"trials": seed}, settings)
    if head["git"] is not None:  # what was run in several calls may be of several commits
        head["git"]["dirty"] |= any(record.get("dirty", True) for record in records)
    revisions = sorted({record["revision"] for record in records if record.get("revision")})
    rows = [row for phase in PHASES if (row := phase_row(phase, [r for r in records if r["phase"] == phase]))]
    failed = [{key: record[key] for key in ("trial", "phase", "rank", "moment")} for record in records if not record["passed"]]
    return {**head, "seconds": sum(record["trial_seconds"] for record in records), "phases": rows, "failed": failed,
            "rows": [{"revision": revision} for revision in revisions]}  # fmt: skip


def phase_row(phase: str, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    seconds = [record["seconds"] for record in records if record["seconds"] is not None]
    if not records:
        return None
    return {
        "phase": PHASES[phase],
        "trials": len(records),
        "rank_0": sum(record["rank"] == 0 for record in records),
        "inside": sum(record["inside"] for record in records),
        "ended": len(seconds),
        "median_seconds": round(statistics.median(seconds), 1) if seconds else None,
        "longest_seconds": max(seconds, default=None),
        "named": sum(bool(record["named"]) for record in records),
        "same": sum(not record["differences"] and record["kept"] for record in records),
    }


def run_chains(driver: Driver, chains: list[Chain], most: int | None) -> Iterator[dict[str, Any]]:
    """The records of the chains that are not in the journal yet, `most` chains of them."""
    known = read_trials(driver.journal)
    pending = [chain for chain in chains if any(trial.number not in known for trial in chain.trials)]
    for chain in pending[:most]:
        yield from driver.chain(chain)


def _session(process: Any) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def line_of(record: dict[str, Any]) -> str:
    end = "did not end" if record["seconds"] is None else f"ended in {record['seconds']:.1f} s"
    verdict = "ok" if record["passed"] else f"FAILED {[text[:200] for text in record['differences']]} named={record['named']}"
    return (f"trial {record['trial']:3d}  {record['phase']:10s}  rank {record['rank']} at {record['moment']} + {record['delay']:.2f} s  "
            f"{'' if record['inside'] else '(after it) '}{end}  {verdict}")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/faults"))
    parser.add_argument("--most", type=int, help="run at most so many chains now; the next call goes on")
    parser.add_argument("--render", type=Path, metavar="PAGE", help="run nothing; fill the marks of PAGE from docs/results")
    arguments = parser.parse_args(argv)
    if arguments.render is not None:
        import render

        text = arguments.render.read_text(encoding="utf-8")
        write_atomic(arguments.render, render.filled(text, REPOSITORY / "docs" / "results"))
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what was started is ended
    driver = Driver(arguments.output, arguments.seed)
    chains = plan(arguments.trials, arguments.seed)
    for record in run_chains(driver, chains, arguments.most):
        print(line_of(record), flush=True)
    known = read_trials(driver.journal)
    records = [known[trial.number] for chain in chains for trial in chain.trials if trial.number in known]
    write_json_atomic(driver.output / "faults.json", summary(records, arguments.seed))
    bad, left = sum(not record["passed"] for record in records), arguments.trials - len(records)
    print(f"{len(records)} trials, {bad} failed" + (f", {left} to do" if left else ""))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
