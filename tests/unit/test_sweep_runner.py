"""The runner of a sweep with a script in the launcher's place: retries, resuming, sharing, what is kept, Slurm's local twin."""

import io
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ds_stability.errors import UserError
from ds_stability.launchers import sweep, sweep_hosts, sweep_progress, sweep_slurm
from ds_stability.launchers.prepare import prepare
from ds_stability.launchers.sweep_folder import SweepFolder
from ds_stability.launchers.sweep_hosts import Hosts
from ds_stability.launchers.sweep_plan import load_plan
from ds_stability.launchers.sweep_slurm import Array, parse_parameters
from ds_stability.locks import TRAIN_LOCK, try_lock

#: Does what acts/SEED-ATTEMPT or acts/SEED says, else succeeds; writes down how it was called.
SCRIPT = '''
import json, os, sys, time
from pathlib import Path
words = sys.argv[2:]
flags = {}
for word in words:
    if word.startswith("--"):
        values = flags[word[2:]] = []
    else:
        values.append(word)
here = Path(__file__).parent
if "model" in flags:  # an evaluation
    (here / "evaluated.json").write_text(json.dumps(flags))
    sys.exit(int((here / "evaluation_code").read_text()) if (here / "evaluation_code").exists() else 0)
run, seed = Path(flags["output_dir"][0]), flags["seed"][0]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps({"seed": int(seed), "flags": flags}) + "\\n")
attempt = sum(json.loads(line)["seed"] == int(seed) for line in open(here / "calls.jsonl"))
act = "ok"
for name in (f"{seed}-{attempt}", seed):
    if (here / "acts" / name).exists():
        act = (here / "acts" / name).read_text()
        break
run.mkdir(parents=True, exist_ok=True)
(run / "manifest.json").write_text(json.dumps({"world_size": 1, "config": json.load(open(flags["deepspeed"][0]))}))
with open(run / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 7, "stability/gain": 0.5}) + "\\n")
if act.startswith("checkpoint"):
    folder = run / act.split()[0]
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text("{}")
    files = {"trainer_state.json": {"bytes": 2, "sha256": ""}}
    (folder / "checkpoint.json").write_text(json.dumps({"version": 1, "step": 4, "world_size": 1, "files": files}))
if act.endswith("fail"):
    print("something broke")
    sys.exit(1)
if act == "mistake":
    print("error: --flag: wrong", file=sys.stderr)
    sys.exit(2)
if act == "slow":
    time.sleep(0.7)
(run / "DONE").write_text("now")
if act == "hang":
    time.sleep(600)
'''
FLAGS = {"deepspeed": "ds_configs/zero3_cpu.json", "config_name": "ds_configs/models/llama_tiny.json",
         "dataset_name": "builtin:synthetic", "synthetic_tokens": 2000, "block_size": 64, "max_steps": 10}  # fmt: skip


@dataclass(frozen=True)
class FakeHosts(Hosts):
    """The script in place of the launcher and whatever it would start."""

    script: str = ""

    def command(self, script, words, port):
        return [sys.executable, self.script, str(port), *words]


class Lab:
    """A sweep's YAML, its folder, and the script's instructions."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "runs" / "test"
        (folder / "acts").mkdir()
        (folder / "script.py").write_text(SCRIPT)

    def plan(self, **document):
        file = self.folder / "test.yaml"
        file.write_text(yaml.safe_dump({"flags": FLAGS, "grid": {"seed": [0, 1]}, **document}, sort_keys=False))
        return load_plan(file)

    def act(self, **acts):
        for name, act in acts.items():
            (self.folder / "acts" / name.strip("s").replace("_", "-")).write_text(act)

    def sweep(self, plan=None, retries=1, begin=True):
        hosts = FakeHosts(1, None, str(self.folder / "script.py"))
        result = sweep.Sweep(plan or self.plan(), SweepFolder(self.path), hosts, retries, stream=io.StringIO())
        if begin:
            result.begin()
        return result

    def calls(self):
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def seeds(self):
        return [call["seed"] for call in self.calls()]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(sweep_hosts, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(sweep_progress, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(sweep_slurm, "POLL_SECONDS", 0.1)
    return Lab(tmp_path)


def test_cells_are_trained_once_with_what_all_share(lab):
    first = lab.sweep()
    assert not first.train().failed and lab.seeds() == [0, 1]
    for call in lab.calls():
        flags = call["flags"]
        assert flags["high_frequency_file"] == [str(lab.path / "high_frequency.json")]
        assert flags["tokenizer_name"] == [str(lab.path / "tokenizer")] and "resume_from_checkpoint" not in flags
        assert flags["disable_tqdm"] == ["true"] and flags["max_steps"] == ["10"]
    assert not lab.sweep().train().failed and lab.seeds() == [0, 1]
    manifest = json.loads((lab.path / "sweep.json").read_text())
    assert [cell["axes"]["seed"] for cell in manifest["cells"]] == [0, 1] and manifest["version"] == 1
    assert all((lab.path / cell["id"] / "DONE").exists() and cell["stability"]["level"] == 0.5 for cell in manifest["cells"])
    rows = first.folder.read_attempts()
    assert [(row["event"], row.get("outcome")) for row in rows] == [("start", None), ("end", "done")] * 2


def test_a_failed_cell_is_tried_again_after_the_others(lab):
    lab.act(s0_1="fail")
    assert not lab.sweep().train().failed and lab.seeds() == [0, 1, 0]
    cell = lab.plan().cells[0].id
    assert (lab.path / f"{cell}.attempt-1" / "metrics.jsonl").exists()  # nothing is deleted
    assert (lab.path / cell / "metrics.jsonl").read_text().count("\n") == 1


def test_what_fails_for_good_is_listed_with_its_log(lab):
    lab.act(s0="fail")
    outcome = lab.sweep(retries=2).train()
    assert lab.seeds() == [0, 1, 0, 0] and list(outcome.failed) == [lab.plan().cells[0].id]
    report = outcome.report()
    assert "1 cell failed" in report and "something broke" in report and "exit code 1 (tried 3 times)" in report


def test_a_mistake_is_not_tried_again(lab):
    lab.act(s1="mistake")
    outcome = lab.sweep(retries=5).train()
    assert lab.seeds() == [0, 1] and "--flag: wrong" in outcome.report()


def test_resumed_from_a_complete_checkpoint_and_anew_if_that_fails(lab):
    lab.act(s0_1="checkpoint-4 fail", s0_2="checkpoint-6 fail", s0_3="fail")
    assert not lab.sweep(retries=3).train().failed
    resumed = ["resume_from_checkpoint" in call["flags"] for call in lab.calls() if call["seed"] == 0]
    assert resumed == [False, True, True, False]  # the third got no further than the checkpoint that it started from
    starts = [row["resumed_from"] for row in lab.sweep().folder.read_attempts() if row["event"] == "start"]
    assert starts == [None, None, 4, 6, None]
    assert (lab.path / f"{lab.plan().cells[0].id}.attempt-1" / "checkpoint-6").exists()


def test_a_cell_waits_for_its_files_and_is_not_run_without_them(lab):
    arms = {"replay": {"flags": {"stability.stabilizers.feedback.replay": "{cell:arm=feedback}/metrics.jsonl", "seed": 1}},
            "feedback": {"flags": {"seed": 0}}}  # fmt: skip
    lab.act(s0_1="fail", s0_2="fail")
    plan = lab.plan(arms=arms, grid={})
    outcome = lab.sweep(plan).train()
    assert lab.seeds() == [0, 0] and "not run, as it needs files of feedback-" in outcome.report()
    assert not lab.sweep(plan).train().failed and lab.seeds() == [0, 0, 0, 1]
    config = json.loads((lab.path / "configs" / f"{plan.cells[1].id}.json").read_text())
    assert config["stability"]["stabilizers"]["feedback"]["replay"] == str(lab.path / plan.cells[0].id / "metrics.jsonl")


def test_two_sweeps_share_the_cells(lab):
    lab.act(**{f"s{seed}": "slow" for seed in range(4)})
    plan = lab.plan(grid={"seed": [0, 1, 2, 3]})
    sweeps = [lab.sweep(plan) for _ in range(2)]
    threads = [threading.Thread(target=one.train) for one in sweeps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(lab.seeds()) == [0, 1, 2, 3] and all(len(one.progress.done) == 4 for one in sweeps)


@pytest.mark.parametrize("lock", ["locks/{cell}.lock", "{cell}/" + TRAIN_LOCK])
def test_a_cell_in_use_is_waited_for(lab, lock):
    one = lab.sweep()
    cell = one.plan.cells[0].id
    held = try_lock(lab.path / lock.format(cell=cell))
    thread = threading.Thread(target=one.train)
    thread.start()
    deadline = time.monotonic() + 30
    while f"another process trains {cell}" not in one.progress.stream.getvalue() or lab.seeds() != [1]:
        assert time.monotonic() < deadline, one.progress.stream.getvalue()
        time.sleep(0.05)
    assert thread.is_alive()
    (lab.path / cell).mkdir(exist_ok=True)
    (lab.path / cell / "DONE").write_text("")  # DONE counts though the lock is held: ending can hang
    thread.join(30)
    assert not thread.is_alive() and lab.seeds() == [1]
    os.close(held)


def test_a_training_that_is_done_and_hangs_is_ended(lab, monkeypatch):
    monkeypatch.setattr(sweep_hosts, "TEARDOWN_SECONDS", 0.3)
    lab.act(s0="hang")
    started = time.monotonic()
    assert not lab.sweep().train().failed and time.monotonic() - started < 30


def test_a_changed_sweep_keeps_adds_and_deletes_nothing(lab):
    before = lab.plan()
    lab.sweep(before).train()
    now = lab.plan(grid={"seed": [1, 2]})
    one = lab.sweep(now)
    text = one.progress.stream.getvalue()
    assert "1 cells kept" in text and now.cells[1].id in text and before.cells[0].id in text
    one.train()
    assert lab.seeds() == [0, 1, 2] and (lab.path / before.cells[0].id / "DONE").exists()
    manifest = json.loads((lab.path / "sweep.json").read_text())
    assert [cell["axes"]["seed"] for cell in manifest["cells"]] == [1, 2]
    assert [cell["id"] for cell in manifest["removed"]] == [before.cells[0].id]


def test_the_folder_of_another_thing_is_refused(lab):
    lab.path.mkdir(parents=True)
    (lab.path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds a single run"):
        lab.sweep()
    (lab.path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="is no plan of a sweep"):
        lab.sweep()


def test_prepared_once_and_not_for_other_data(lab):
    one = lab.sweep()
    before = {name: (lab.path / name).stat().st_mtime_ns for name in ("high_frequency.json", "tokenizer/tokenizer.json")}
    lab.sweep()
    assert before == {name: (lab.path / name).stat().st_mtime_ns for name in before}
    with pytest.raises(UserError, match="made from other settings"):
        lab.sweep(lab.plan(flags={**FLAGS, "synthetic_tokens": 3000}))
    # A shorter training text leaves the tokenizer alone.
    prose = {**FLAGS, "dataset_name": "builtin:prose"}
    contents = []
    for name, flags in (("all", prose), ("few", {**prose, "max_train_samples": 40})):
        command = next(iter(sweep.check_cells(lab.plan(flags=flags, grid={}), lab.path).values()))
        (lab.folder / name).mkdir()
        prepare(command, lab.folder / name)
        contents.append((lab.folder / name / "tokenizer" / "tokenizer.json").read_text())
    assert contents[0] == contents[1] and one.shared["tokenizer_name"] == str(lab.path / "tokenizer")


def test_a_set_that_is_given_is_the_sweep_s(lab):
    lab.sweep()
    given = lab.folder / "given.json"
    values = json.loads((lab.path / "high_frequency.json").read_text())
    given.write_text(json.dumps({**values, "token_ids": [7, 8], "coverage_reached": 0.1}))
    other = Lab.__new__(Lab)
    other.folder, other.path = lab.folder, lab.folder / "runs" / "other"
    other.sweep(lab.plan(flags={**FLAGS, "high_frequency_file": str(given)})).train()
    assert json.loads((other.path / "high_frequency.json").read_text())["token_ids"] == [7, 8]
    assert lab.calls()[-1]["flags"]["high_frequency_file"] == [str(other.path / "high_frequency.json")]


def test_attempts_survive_a_line_that_was_cut_off(lab):
    one = lab.sweep()
    cell = one.plan.cells[0]
    assert one.folder.begin_attempt(cell, None) == 1
    with open(one.folder.attempts, "a") as file:
        file.write('{"event": "start", "ce')
    assert one.folder.begin_attempt(cell, 5) == 2
    assert [row["attempt"] for row in one.folder.read_attempts()] == [1, 2]


def test_evaluation_gets_all_cells_that_are_done(lab):
    lab.act(s1="mistake")
    one = lab.sweep(lab.plan(evaluate={"suite": "quick", "seeds": [3, 4]}))
    one.train()
    assert one.evaluate()
    flags = json.loads((lab.folder / "evaluated.json").read_text())
    assert flags == {"model": [str(lab.path / one.plan.cells[0].id)], "suite": ["quick"], "seeds": ["3", "4"],
                     "output_dir": [str(lab.folder / "evals" / "test")],
                     "reference_file": [str(lab.path / "high_frequency.json")]}  # fmt: skip
    (lab.folder / "evaluation_code").write_text("1")
    assert not one.evaluate()


@pytest.mark.slow  # a job imports torch, and there are seven
class TestSlurm:
    """By submitit's local executor, which runs the same pickled jobs as processes of this machine."""

    @pytest.fixture(autouse=True)
    def _by_value(self):
        pytest.importorskip("submitit")
        import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[FakeHosts.__module__])  # jobs cannot import this file
        yield
        cloudpickle.unregister_pickle_by_value(sys.modules[FakeHosts.__module__])

    @pytest.mark.slow
    def test_cells_in_the_order_of_their_needs_and_a_failed_one_again(self, lab):
        arms = {"replay": {"flags": {"stability.stabilizers.feedback.replay": "{cell:arm=feedback}/metrics.jsonl", "seed": 1}},
                "feedback": {"flags": {"seed": 0}}, "broken": {"flags": {"seed": 2}}}  # fmt: skip
        lab.act(s2="fail")
        one = lab.sweep(lab.plan(arms=arms, grid={}, evaluate={"suite": "quick", "seeds": [0]}))
        array = Array(one, {"cluster": "local", "timeout_min": 5})
        outcome = array.train()
        seeds = lab.seeds()
        assert sorted(seeds) == [0, 1, 2, 2] and seeds.index(0) < seeds.index(1)
        assert [cell.split("-")[0] for cell in outcome.failed] == ["broken"] and "something broke" in outcome.report()
        assert array.evaluate() and len(json.loads((lab.folder / "evaluated.json").read_text())["model"]) == 2

    def test_an_interrupt_ends_the_jobs(self, lab):
        lab.act(s0="hang", s1="hang")
        one = lab.sweep()
        array = Array(one, {"cluster": "local", "timeout_min": 5})

        def interrupt():
            if len(lab.seeds()) < 2:
                return ""
            raise KeyboardInterrupt

        array.sweep.open_cells = lambda: list(one.plan.cells)  # the script's DONE must not end the loop before the interrupt
        array._state = interrupt
        with pytest.raises(KeyboardInterrupt):
            array.train()
        assert array.jobs and all(job.done() for job in array.jobs.values())
        assert not _processes_of(lab.folder / "script.py")

    def test_parameters(self, lab):
        assert parse_parameters(["slurm_partition=gpu", "gpus_per_node=8", "slurm_time=1:30:00"]) == {
            "slurm_partition": "gpu", "gpus_per_node": 8, "slurm_time": "1:30:00"}
        for word, message in (("gpu", "KEY=VALUE"), ("cluster=moon", "allowed are slurm, local"), ("nodes=2", "one node")):
            with pytest.raises(UserError, match=message):
                parse_parameters([word])
        with pytest.raises(UserError, match="--slurm"):
            Array(lab.sweep(), {"cluster": "local", "no_such_parameter": 1})


def _processes_of(script: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(script).encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def command(lab, *words):
    from ds_stability.cli import main

    return main(["sweep", str(lab.folder / "test.yaml"), "--output_dir", str(lab.path), *words])


def test_the_command_line(lab, monkeypatch, capsys):
    script = str(lab.folder / "script.py")
    monkeypatch.setattr(Hosts, "command", lambda self, _, words, port: [sys.executable, script, str(port), *words])
    lab.act(s1="mistake")
    plan = lab.plan(evaluate={"suite": "quick", "seeds": [0]})
    assert command(lab, "--dry_run") == 0 and not lab.path.exists()
    assert capsys.readouterr().out.count("to train") == 2
    assert command(lab, "--no_evaluate") == 1 and not (lab.folder / "evaluated.json").exists()
    assert f"1 cell failed:\n\n{plan.cells[1].id}: failed with exit code 2" in capsys.readouterr().err
    (lab.folder / "acts" / "1").unlink()
    assert command(lab) == 0 and (lab.folder / "evaluated.json").exists()
    assert lab.calls()[0]["flags"]["high_frequency_file"] and lab.seeds() == [0, 1, 1]


@pytest.mark.parametrize("words, message", [
    (["--retries", "-1"], "--retries -1: allowed is a number from 0"),
    (["--hostfile", "nowhere"], "--hostfile nowhere: cannot be read"),
    (["--slurm", "gpu"], "--slurm gpu: allowed is KEY=VALUE"),
    (["--num_gpus", "0"], "num_gpus 0: allowed is"),
    (["--set", "grid.seed=[0,0]"], "two cells"),
    (["--set", "evaluate.suite=qick"], "qick"),
])  # fmt: skip
def test_mistakes_on_the_command_line(lab, capsys, words, message):
    lab.plan(evaluate={"suite": "quick"})
    assert command(lab, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not lab.path.exists()
