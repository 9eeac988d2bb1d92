"""What statistics and feedback cost: step time and memory as ratios to plain DeepSpeed ZeRO-3, and how the ratio grows.

    python benchmarks/performance.py [--output runs/performance]      measure all, write docs/performance.md (`make bench`)
    python benchmarks/performance.py --cases smollm2 --growth ranks   measure these parts; others stay as OUTPUT has them
    python benchmarks/performance.py --quick --output runs/quick      a smoke test of seconds; the page goes to OUTPUT
    python benchmarks/performance.py --render                         the page and the figures from the results files only

Time: the engines of all arms of a case live in one process per rank and take turns; a round's ratio is that of the turns in it.
Memory: each arm alone in processes of its own. On a GPU, where there is one, the same on one rank. Writes OUTPUT/performance.json
(performance_cuda.json on a GPU), a copy in docs/results/, docs/performance.md and its figures.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import performance_cases as plan
import performance_page
import performance_stats as stats
import training

from ds_stability.run_dir import git_revision, utc_now, write_json_atomic

WORKER = Path(__file__).resolve().parent / "performance_worker.py"
START_SECONDS = 12.0  # of a launch, roughly: imports and engines
SHOW_SECONDS = 10.0  # between two lines of progress


def main() -> int:
    arguments = parse_arguments()
    docs = Path(arguments.docs).resolve()
    if arguments.check:
        return performance_page.check(docs)
    if not arguments.render:
        training.end_children_on_sigterm()
        output = Path(arguments.output).resolve()
        stem = "performance_cuda" if training.on_gpu() else "performance"
        body = measure_all(arguments, output, output / f"{stem}.json")
        (docs / "results").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output / f"{stem}.json", docs / "results" / f"{stem}.json")
        for line in performance_page.summary_lines(body):
            print(line)
    for path in performance_page.write(docs):
        print(path)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", default="runs/performance", help="for logs and the results file; parts that it has are kept"
    )
    parser.add_argument(
        "--docs", help="folder of performance.md, results/ and figures/; default docs, with --quick OUTPUT"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps: does it work?")
    parser.add_argument("--cases", nargs="*", choices=plan.cases(), help="only these cases; alone it leaves growth out")
    parser.add_argument("--growth", nargs="*", choices=plan.AXES, help="only these axes; alone it leaves the cases out")
    parser.add_argument("--memory_rounds", type=int, default=1, help="processes per arm for the memory")
    parser.add_argument(
        "--num_gpus", type=int, default=None, help="processes; default 2, or 1 on a machine with one GPU"
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing; page and figures from the results files"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is out of date")
    arguments = parser.parse_args()
    for name in ("memory_rounds", "num_gpus"):
        if vars(arguments)[name] is not None and vars(arguments)[name] < 1:
            parser.error(f"--{name} {vars(arguments)[name]}: allowed are numbers from 1")
    if arguments.quick and (arguments.cases is not None or arguments.growth is not None):
        parser.error("--quick measures its own small cases: leave out --cases and --growth")
    arguments.docs = arguments.docs or (arguments.output if arguments.quick else str(common.REPOSITORY / "docs"))
    return arguments


# ---- what to do -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One launch of the worker: `take` puts its results, one per case, where they belong; `needed` is asked just before."""

    name: str
    mode: str
    cases: list[dict[str, Any]]
    ranks: int
    seconds: float  # roughly
    take: Callable[[list[dict[str, Any]]], None]
    needed: Callable[[], bool] = lambda: True


def measure_all(arguments: argparse.Namespace, output: Path, path: Path) -> dict[str, Any]:
    """Run the chosen parts and merge them into the results file, part by part, so that a broken run keeps what it has."""
    output.mkdir(parents=True, exist_ok=True)
    num_gpus = arguments.num_gpus or training.default_processes()
    settings = {"ranks": num_gpus, "memory_rounds": arguments.memory_rounds, "quick": arguments.quick}
    body = common.describe_measurement("performance", {"seed": 0}, settings) | {
        "seconds": 0.0,
        "cases": {},
        "growth": {},
    }
    body = merged(body, path)
    cases, axes = chosen(arguments)
    parts = [case_part(name, case, num_gpus, arguments.memory_rounds, body) for name, case in cases.items()]
    if axes:
        parts.append(growth_part(axes, num_gpus, body))
    meter = Meter([job for jobs, _ in parts for job in jobs])
    for jobs, finish in parts:
        started = time.monotonic()
        for job in jobs:
            if job.needed():
                job.take(launch(job, output, meter))
            else:
                meter.skip()
        finish(
            {
                "git": git_revision(common.REPOSITORY),
                "finished_at": utc_now(),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        body["finished_at"], body["seconds"] = utc_now(), performance_page.total_seconds(body)
        write_json_atomic(path, body)
    return body


def merged(body: dict[str, Any], path: Path) -> dict[str, Any]:
    """`body` with the parts that the results file has already.

    Raises:
        FailedRun: the file was measured on another machine, or with other settings.
    """
    if not path.exists():
        return body
    old = json.loads(path.read_text(encoding="utf-8"))
    for key in ("machine", "versions", "settings"):
        if old[key] != body[key]:
            raise training.FailedRun(
                f"{path} was measured with another {key} ({old[key]}); give another --output, or remove it"
            )
    return body | {"cases": old["cases"], "growth": old["growth"]}


def chosen(arguments: argparse.Namespace) -> tuple[dict[str, plan.Case], dict[str, list[plan.Point]]]:
    """The cases and axes of this run: all, or those that were named."""
    gpus = max_ranks()
    cases, axes = plan.cases(arguments.quick), plan.growth(arguments.quick, gpus)
    if arguments.cases is None and arguments.growth is None:
        return cases, axes
    names, wanted = arguments.cases or [], arguments.growth or []
    return {name: cases[name] for name in names}, {axis: axes[axis] for axis in wanted}


def max_ranks() -> int:
    if not training.on_gpu():
        return 4
    import torch

    return torch.cuda.device_count()


def case_part(
    name: str, case: plan.Case, ranks: int, memory_rounds: int, body: dict[str, Any]
) -> tuple[list[Job], Callable]:
    """(jobs, what to do with their results): all arms in turns, then each alone."""
    found: dict[str, Any] = {"memory": {}, "not_run": {}}
    jobs = [Job(f"{name}: step time, {len(case.arms)} engines in turns", "time", [{"name": name} | case.spec()], ranks,
                START_SECONDS + case.steps_in_turns * case.step_seconds, lambda results: found.update(time=results[0]))]  # fmt: skip

    def take(arm: str) -> Callable[[list[dict[str, Any]]], None]:
        def keep(results: list[dict[str, Any]]) -> None:
            found["not_run"] |= results[0]["not_run"]
            if results[0]["memory"] is not None:
                found["memory"].setdefault(arm, []).append(results[0]["memory"])

        return keep

    for number in range(memory_rounds):
        for arm in case.memory:
            spec = {"name": name} | case.spec() | {"arms": {arm: plan.ARMS[arm]}}
            seconds = START_SECONDS + (case.memory_steps + 2) * case.step_seconds
            title = f"{name}: memory of {arm}, {number + 1} of {memory_rounds}"
            needed = lambda arm=arm: arm not in found["time"]["not_run"]  # noqa: E731
            jobs.append(Job(title, "memory", [spec], ranks, seconds, take(arm), needed))
    return jobs, lambda measured: body["cases"].update({name: case_result(case, found) | {"measured": measured}})


def growth_part(axes: dict[str, list[plan.Point]], ranks: int, body: dict[str, Any]) -> tuple[list[Job], Callable]:
    """One launch for each number of ranks, with all points that want it."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    jobs = []
    for size in sorted({point.ranks or ranks for points in axes.values() for point in points}):
        here = [(axis, point) for axis, points in axes.items() for point in points if (point.ranks or ranks) == size]
        seconds = START_SECONDS + sum(point.case.steps_in_turns * point.case.step_seconds for _, point in here)
        keys = [(axis, point.x) for axis, point in here]
        jobs.append(
            Job(
                f"growth on {size} ranks, {len(here)} models",
                "time",
                [{"name": f"{axis} {point.x}"} | point.case.spec() for axis, point in here],
                size,
                seconds,
                lambda results, keys=keys: found.update(zip(keys, results, strict=True)),
            )
        )

    def finish(measured: dict[str, Any]) -> None:
        for axis, points in axes.items():
            body["growth"][axis] = growth_result([(p.x, found[axis, p.x]) for p in points]) | {"measured": measured}

    return jobs, finish


def launch(job: Job, output: Path, meter: "Meter") -> list[dict[str, Any]]:
    """Run the worker and read what it wrote. FailedRun if it wrote nothing; the message ends with its log."""
    result, spec, log = output / "worker.json", output / "spec.json", output / "worker.log"
    result.unlink(missing_ok=True)
    write_json_atomic(spec, {"mode": job.mode, "cases": job.cases, "output": str(result)})
    meter.begin(job)
    code = training.run_script(WORKER, [str(spec)], job.ranks, log, lambda process: meter.watch(process, log, result))
    if not result.exists():
        raise training.FailedRun(
            f"{job.name}: the worker ended without a result (exit code {code}); {training.log_tail(log)}"
        )
    meter.end()
    return json.loads(result.read_text(encoding="utf-8"))


# ---- what came of it ------------------------------------------------------------------------------------------------


def case_result(case: plan.Case, found: dict[str, Any]) -> dict[str, Any]:
    """One case of the results file: every arm's figures, the verdicts, and a profile of each arm that was too slow."""
    timed, targets = found["time"], {arm: vars(target) for arm, target in case.targets.items()}
    not_run = timed["not_run"] | found["not_run"]
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys([*case.arms, *case.memory]):
        arms[arm] = {"not_run": not_run[arm]} if arm in not_run else {}
        if arm in timed["seconds"]:
            arms[arm] |= timed_arm(arm, timed)
        if arm in found["memory"]:
            arms[arm]["memory"] = stats.memory_of(found["memory"][arm])
    for arm in arms.values():
        arm["against"] = {
            name: stats.against(arm, other) for name, other in arms.items() if name in (plan.PLAIN, *plan.REFERENCES)
        }
    verdicts = stats.verdicts(arms, targets, plan.PLAIN)
    slow = {row["arm"] for row in verdicts if row["quantity"] == "step time" and row["verdict"].startswith("missed")}
    profiles = {
        arm: stats.profile_difference(timed["profile"][arm], timed["profile"][plan.PLAIN])
        for arm in case.arms
        if arm in slow
    }
    shown = {key: value for key, value in case.spec().items() if key != "arms"}
    return {
        **shown,
        "world_size": timed["world_size"],
        "targets": targets,
        "arms": arms,
        "verdicts": verdicts,
        "profiles": profiles,
    }


def timed_arm(arm: str, timed: dict[str, Any]) -> dict[str, Any]:
    seconds = timed["seconds"]
    return {"seconds": seconds[arm], **stats.ratios(seconds[arm], seconds[plan.PLAIN]), "loss_path": timed["loss_path"][arm],
            "messages": stats.messages(timed["messages"][arm], timed["messages"][plan.PLAIN])}  # fmt: skip


def growth_result(points: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """One axis of the results file: every point's ratios by arm, and the slope of each arm."""
    rows = []
    for x, timed in points:
        seconds = timed["seconds"]
        arms = {arm: stats.ratios(values, seconds[plan.PLAIN]) for arm, values in seconds.items() if arm != plan.PLAIN}
        rows.append({"x": x, "world_size": timed["world_size"], "seconds": seconds[plan.PLAIN], "arms": arms})
    slopes = {}
    if len(rows) > 1:
        slopes = {arm: stats.slope([(row["x"], row["arms"][arm]["ratios"]) for row in rows]) for arm in rows[0]["arms"]}
    return {"points": rows, "slopes": slopes}


class Meter:
    """Lines of progress: which launch, its steps and rate, the time that is left in all."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs, self.position, self.spent, self.expected = list(jobs), 0, 0.0, 0.0

    def begin(self, job: Job) -> None:
        self.job, self.started, self.shown_at = job, time.monotonic(), time.monotonic()
        self.position += 1
        self.first: tuple[int, float] | None = None
        print(
            f"[{self.position} of {len(self.jobs)}] {job.name}; {training.clock(self.left())} left in all", flush=True
        )

    def skip(self) -> None:
        self.position += 1

    def watch(self, process: subprocess.Popen, log: Path, result: Path) -> None:
        finished_at = None
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if result.exists():
                finished_at = finished_at or now
                if now - finished_at > training.TEARDOWN_SECONDS:
                    return
            elif now - self.shown_at > SHOW_SECONDS:
                self.shown_at = now
                print(self.line(*last_progress(log), now), flush=True)

    def line(self, done: int, whole: int, now: float) -> str:
        if done and self.first is None:
            self.first = (done, now)
        if self.first is None or done <= self.first[0]:
            return f"    starting, {now - self.started:.0f} s"
        rate = (done - self.first[0]) / (now - self.first[1])
        here = (whole - done) / rate
        later = self.left() - min(self.left(), self.job.seconds * self.pace())
        return f"    step {done}/{whole}  {rate:.2f} steps/s  {training.clock(here)} left here, {training.clock(here + later)} in all"

    def end(self) -> None:
        self.spent, self.expected = self.spent + time.monotonic() - self.started, self.expected + self.job.seconds

    def pace(self) -> float:
        """Seconds that were spent for each that was expected."""
        return self.spent / self.expected if self.expected else 1.0

    def left(self) -> float:
        return self.pace() * sum(job.seconds for job in self.jobs[max(0, self.position - 1) :])


def last_progress(log: Path) -> tuple[int, int]:
    """(steps done, all steps) by the last `progress` line; (0, 0) before there is one."""
    found = re.findall(r"^progress (\d+)/(\d+)$", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


if __name__ == "__main__":
    sys.exit(training.run_main(main))
