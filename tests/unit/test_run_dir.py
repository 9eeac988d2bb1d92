import json
import os
import stat
import subprocess
import threading

import pytest

from ds_stability.errors import UserError
from ds_stability.run_dir import (
    RunDir,
    build_manifest,
    check_output_dir,
    git_revision,
    package_versions,
    set_aside,
    write_atomic,
    write_json_atomic,
)

IDENTITY = {
    "model": "/models/a",
    "stability": {"level": 0.5, "stabilizers": {"feedback": {}}},
    "data": {"train": "f00"},
}


def make_run(path, identity=IDENTITY):
    run = RunDir(path).create()
    run.write_manifest(build_manifest(config={}, identity=identity, seeds={"train": 0}, data={}, world_size=2))
    return run


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_paths(tmp_path):
    run = RunDir(tmp_path / "a")
    assert run.sample_file(200) == tmp_path / "a" / "samples" / "step-00000200.jsonl"
    assert run.checkpoint(7).name == "checkpoint-7"
    assert not run.path.exists()
    assert run.checkpoints() == []


def test_checkpoints_are_sorted_by_step_and_other_names_are_left_out(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-3x", "xcheckpoint-1", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    assert [step for step, _ in RunDir(tmp_path).checkpoints()] == [20, 100]


def test_write_atomic_text_and_bytes_and_parents(tmp_path):
    write_atomic(tmp_path / "new" / "a.txt", "näh\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "näh\n".encode()
    write_atomic(tmp_path / "new" / "a.txt", b"\x00")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\x00"
    assert os.listdir(tmp_path / "new") == ["a.txt"]


def test_write_atomic_respects_the_umask(tmp_path):
    write_atomic(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, failing):
    write_atomic(tmp_path / "a", "old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_atomic(tmp_path / "a", "x")
    assert order == ["fsync", "replace", "fsync"]


def test_readers_never_see_a_partial_file(tmp_path):
    path, stop, seen = tmp_path / "a", threading.Event(), set()
    write_atomic(path, "0" * 100_000)

    def read():
        while not stop.is_set():
            text = path.read_text()
            seen.add((len(text), text[:1] * len(text) == text))

    reader = threading.Thread(target=read)
    reader.start()
    for digit in "123456789":
        write_atomic(path, digit * 100_000)
    stop.set()
    reader.join()
    assert seen == {(100_000, True)}


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError):
        write_json_atomic(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_manifest_round_trip(tmp_path):
    run = make_run(tmp_path / "a")
    manifest = run.read_manifest()
    assert manifest["identity"] == IDENTITY
    assert manifest["seeds"] == {"train": 0}
    assert manifest["world_size"] == 2
    assert manifest["started_at"].endswith("+00:00")
    named = {"python", "torch", "deepspeed", "transformers", "accelerate", "datasets", "ds_stability"}
    assert named <= set(manifest["versions"])
    assert manifest["versions"]["python"].count(".") == 2
    assert len(manifest["hosts"]) == 1
    assert isinstance(manifest["command"], list)


def test_versions_of_absent_packages_are_null(monkeypatch):
    monkeypatch.setattr("ds_stability.run_dir.PACKAGES", ("no-such-distribution-anywhere", "pytest"))
    versions = package_versions()
    assert versions["no-such-distribution-anywhere"] is None
    assert versions["pytest"]


def git(directory, *arguments):
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "one")
    assert git_revision(tmp_path) == {"revision": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path)["dirty"] is True


def test_git_is_best_effort(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(tmp_path) is None


def test_a_new_or_empty_directory_is_allowed_and_nothing_is_made(tmp_path):
    check_output_dir(tmp_path / "a" / "b", resume=False)
    assert os.listdir(tmp_path) == []
    check_output_dir(tmp_path, resume=False)
    assert os.listdir(tmp_path) == []


def test_another_run_is_refused(tmp_path):
    make_run(tmp_path / "a")
    with pytest.raises(UserError) as error:
        check_output_dir(tmp_path / "a", resume=False, identity=IDENTITY)
    message = one_line(error)
    assert "another run" in message and "--output_dir" in message and "--resume_from_checkpoint" in message


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError) as error:
        check_output_dir(tmp_path, resume=False)
    assert "not empty" in one_line(error)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("")
    for resume in (False, True):
        with pytest.raises(UserError) as error:
            check_output_dir(tmp_path / "a", resume=resume)
        assert "not a directory" in one_line(error)
    with pytest.raises(UserError):  # a file above it
        check_output_dir(tmp_path / "a" / "b", resume=False)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a place where even root cannot write")
def test_an_unwritable_place_is_refused_for_root_too():
    with pytest.raises(UserError) as error:
        check_output_dir("/proc/self/runs/a", resume=False)
    assert "cannot be written" in one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError):
        check_output_dir(tmp_path / "a", resume=False)


def test_a_run_that_died_early_may_start_anew_and_loses_nothing(tmp_path):
    run = make_run(tmp_path)
    run.metrics.write_text('{"step": 1}\n')
    (tmp_path / "train.lock").touch()
    check_output_dir(tmp_path, resume=False, restart=True)
    assert set_aside(run) == tmp_path / "attempt-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt-1", "train.lock"]
    assert sorted(path.name for path in (tmp_path / "attempt-1").iterdir()) == ["manifest.json", "metrics.jsonl"]
    assert set_aside(run) is None  # nothing more
    make_run(tmp_path)
    assert set_aside(run) == tmp_path / "attempt-2"


@pytest.mark.parametrize("name", ["train.lock", ".manifest.json.17-ab12cd34.tmp", ".saving-4", ".removing-checkpoint-4", "attempt-1"])
def test_what_a_killed_start_leaves_behind_does_not_block_the_next_one(tmp_path, name):
    (tmp_path / name).touch()
    check_output_dir(tmp_path, resume=False, restart=True)


def test_a_folder_of_something_else_is_not_started_anew_in(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds no run"):
        check_output_dir(tmp_path, resume=False, restart=True)


def test_resume_of_the_same_run(tmp_path):
    make_run(tmp_path / "a", {**IDENTITY, "schedule": ((0, 0.1), (5, 0.2))})
    # lists read back from JSON equal tuples given now
    before = sorted(path.name for path in (tmp_path / "a").iterdir())
    check_output_dir(tmp_path / "a", resume=True, identity={**IDENTITY, "schedule": ((0, 0.1), (5, 0.2))})
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before  # the check itself leaves nothing behind


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"model": "/models/b"}, 'model = "/models/a", this command has "/models/b"'),
        ({"stability": {"level": 0.7, "stabilizers": {"feedback": {}}}}, "stability.level = 0.5, this command has 0.7"),
        ({"stability": {"level": 0.5, "stabilizers": {}}}, "stability.stabilizers"),
        ({"data": {"train": "bad"}}, "data.train"),
        ({"data": {}}, "data"),
        ({"extra": 1}, "extra = nothing, this command has 1"),
    ],
)
def test_resume_of_another_run_names_what_differs(tmp_path, change, expected):
    make_run(tmp_path / "a")
    with pytest.raises(UserError) as error:
        check_output_dir(tmp_path / "a", resume=True, identity={**IDENTITY, **change})
    assert expected in one_line(error)


def test_resume_without_a_run_or_with_a_broken_manifest(tmp_path):
    with pytest.raises(UserError) as error:
        check_output_dir(tmp_path / "a", resume=True, identity=IDENTITY)
    assert "nothing to resume" in one_line(error)
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError) as error:
        check_output_dir(tmp_path, resume=True, identity=IDENTITY)
    assert "no manifest.json" in one_line(error)
    for broken in ('{"identity": ', "[]", "\udcff"):
        (tmp_path / "manifest.json").write_bytes(broken.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError) as error:
            check_output_dir(tmp_path, resume=True, identity=IDENTITY)
        assert "manifest.json" in one_line(error)


def test_done_is_a_file_with_the_time(tmp_path):
    run = make_run(tmp_path / "a")
    assert not run.done.exists()
    run.mark_done()
    assert "T" in run.done.read_text()
    assert json.loads(run.manifest.read_text())["world_size"] == 2
