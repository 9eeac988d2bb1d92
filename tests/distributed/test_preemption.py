"""SIGTERM and SIGUSR1, to one rank, to all, to the launcher, to the process group: the step is finished and saved, exit
code 75, and the run that is started again is the undisturbed one to the bit.

One run is stopped several times and started again each time, so that starts are shared.
"""

import os
import signal

import pytest

from ds_stability.checkpoint_files import hash_fault
from ds_stability.run_dir import RunDir

# `deepspeed` is two processes on a host: the runner, which has no handler there and ends alone, and its child, the launcher
# proper (deepspeed/launcher/launch.py), which passes SIGTERM on. A batch system signals the group.
LAUNCHER, GROUP = "launcher", "group"
CODES = {LAUNCHER: 1, GROUP: -signal.SIGTERM}  # of the runner; a rank's own code comes through when ranks are signalled
CHAINS = {
    "default": ((signal.SIGUSR1, (1,)), (signal.SIGTERM, GROUP)),
    "other": ((signal.SIGTERM, (0,)), (signal.SIGUSR1, (0, 1)), (signal.SIGTERM, LAUNCHER)),
    "both": ((signal.SIGTERM, (0, 1)),),
}
STEPS = (6, 13, 18)  # at which the signals come: none of them saves by itself


def stop(driver_module, place, output, log, number, whom, step):
    """Start the run, send the signal after `step`, wait for the end; (exit code of the launcher, everything printed)."""
    import fault_processes
    import fault_runs

    run = RunDir(output)
    attempt = driver_module.Attempt(place.runs["training"], output, log, place.environment)
    try:
        moment = fault_runs.Moment(f"step {step}", lambda: fault_runs.last_step(run) >= step, lambda: True)
        assert attempt.wait_for(moment), attempt.text()[-3000:]
        if whom == GROUP:
            os.killpg(attempt.process.pid, number)
        else:
            ranks = [fault_processes.rank_process(attempt.marker, rank) for rank in (whom if whom != LAUNCHER else (0,))]
            for process in ranks if whom != LAUNCHER else [ranks[0].parent()]:
                process.send_signal(number)
        text = attempt.wait_until_ended()
    finally:
        attempt.clear()
    return attempt.process.returncode, text


def chain(place, folder, signals):
    """The stops of one run, and its end; [(exit code, text, newest checkpoint, last step, lines kept)], the run's folder."""
    import driver
    import fault_runs

    place.undisturbed("training")
    run, output, stops, kept = place.runs["training"], folder / "run", [], b""
    for count, ((number, whom), step) in enumerate(zip(signals, STEPS, strict=False)):
        code, text = stop(driver, place, output, folder / f"{count}.log", number, whom, step)
        newest, path = RunDir(output).checkpoints()[-1]
        stops.append({"code": code, "text": text, "newest": newest, "fault": hash_fault(path), "asked": step,
                      "last": fault_runs.last_step(RunDir(output)), "kept": run.keeps(output, kept)})  # fmt: skip
        kept = run.kept(output)
    driver.Attempt(run, output, folder / "last.log", place.environment).wait_until_done()
    stops.append({"kept": run.keeps(output, kept)})
    return stops, run.results(output)


def check(place, stops, results, signals):
    assert len(stops) == len(signals) + 1  # the last one is the start that comes to the end
    for (number, whom), record in zip(signals, stops, strict=False):
        assert record["code"] == CODES.get(whom, 75), record["text"][-3000:]
        lines = [line for line in record["text"].splitlines() if line.startswith("stopped: ")]
        assert len(lines) == 1 and f"after step {record['newest']}," in lines[0] and "auto goes on" in lines[0], record["text"][-3000:]
        assert number.name in lines[0] or "signal to another rank" in lines[0]
        assert record["fault"] is None and record["asked"] < record["newest"] == record["last"]
        assert "Traceback" not in record["text"] and "error: " not in record["text"]
    assert all(record["kept"] for record in stops)  # each start went on from where the one before had stopped
    assert results == place.undisturbed("training")


def test_a_stopped_run_goes_on_as_if_nothing_had_been(fault_driver, tmp_path):
    signals = CHAINS["default"]
    check(fault_driver, *chain(fault_driver, tmp_path, signals), signals)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other", "both"])
def test_the_other_signals_and_receivers(fault_driver, tmp_path, name):
    signals = CHAINS[name]
    check(fault_driver, *chain(fault_driver, tmp_path, signals), signals)


def test_the_signals_of_the_chains_are_all_there_are():
    pairs = {(number, whom if whom in CODES else len(whom)) for signals in CHAINS.values() for number, whom in signals}
    assert pairs == {(signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGTERM, 2), (signal.SIGUSR1, 2), (signal.SIGTERM, LAUNCHER),
                     (signal.SIGTERM, GROUP)}  # fmt: skip
