"""Whole, torn, truncated and changed checkpoint folders; what is deleted and what is not."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability import checkpoint_files as files
from ds_stability.errors import UserError
from ds_stability.run_dir import RunDir

CONTENT = {"trainer_state.json": b"{}", "global_step4/a.pt": b"weights" * 1000, "global_step4/b.pt": b"", "latest": b"global_step4"}


def write(folder, step=4, world_size=2):
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    parts = [files.describe_files(folder, files.list_files(folder)[rank::world_size]) for rank in range(world_size)]
    files.write_manifest(folder, {name: entry for part in parts for name, entry in part.items()}, step, world_size)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "checkpoint-4")


def faults(folder, ranks=2):
    return [fault for rank in range(ranks) if (fault := files.hash_fault(folder, (rank, ranks))) is not None]


def test_what_was_written_is_whole(checkpoint):
    record = files.read_manifest(checkpoint)
    assert set(record["files"]) == set(CONTENT) and (record["step"], record["world_size"]) == (4, 2)
    assert {name: entry["bytes"] for name, entry in record["files"].items()} == {name: len(data) for name, data in CONTENT.items()}
    assert files.size_fault(checkpoint) is None and not faults(checkpoint) and not faults(checkpoint, 3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_ranks_share_the_files_without_gap_or_overlap(checkpoint, ranks):
    parts = [files.describe_files(checkpoint, files.list_files(checkpoint)[rank::ranks]) for rank in range(ranks)]
    assert sorted(name for part in parts for name in part) == sorted(CONTENT)


@pytest.mark.parametrize("name", list(CONTENT))
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert files.size_fault(checkpoint) == f"{name} is missing"


def test_a_truncated_file_is_named_with_its_sizes(checkpoint):
    os.truncate(checkpoint / "global_step4" / "a.pt", 6_999)
    assert files.size_fault(checkpoint) == "global_step4/a.pt has 6,999 bytes instead of 7,000"
    with open(checkpoint / "global_step4" / "a.pt", "ab") as file:
        file.write(b"xx")
    assert "7,001 bytes" in files.size_fault(checkpoint)


@given(position=st.integers(0, 6_999), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_by_exactly_one_rank(tmp_path_factory, position, bit):
    folder = write(tmp_path_factory.mktemp("flip") / "checkpoint-4")
    data = bytearray(CONTENT["global_step4/a.pt"])
    data[position] ^= 1 << bit
    (folder / "global_step4" / "a.pt").write_bytes(data)
    assert files.size_fault(folder) is None  # its size tells nothing
    found = faults(folder)
    assert len(found) == 1 and "global_step4/a.pt" in found[0]


def test_one_without_manifest_is_cut_off(checkpoint):
    (checkpoint / files.MANIFEST).unlink()
    assert "cut off" in files.size_fault(checkpoint)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '{"version": 1}', '{"version": 99, "step": 4, "world_size": 2, "files": {}}',
    '{"version": 1, "step": 4, "world_size": 2, "files": {"a": 3}}', '{"version": 1, "step": "4", "world_size": 2, "files": {}}',
    '{"version": 1, "step": 4, "world_size": 2, "files": {"../a": {"bytes": 1, "sha256": ""}}}',
    '{"version": 1, "step": 4, "world_size": 2, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}', "[" * 100_000,
])  # fmt: skip
def test_a_broken_manifest_is_a_user_error(checkpoint, text):
    (checkpoint / files.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=files.MANIFEST):
        files.read_manifest(checkpoint)
    assert files.MANIFEST in files.size_fault(checkpoint)


@given(st.binary(max_size=200))
def test_random_bytes_as_a_manifest_never_raise_anything_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / files.MANIFEST).write_bytes(data)
    assert files.size_fault(folder) is not None


def test_nothing_of_the_manifest_exists_until_all_is_written(tmp_path, monkeypatch):
    """A full disk at the last moment: the folder does not count."""
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_json_atomic", full)
    with pytest.raises(OSError):
        write(tmp_path / "checkpoint-4")
    assert "cut off" in files.size_fault(tmp_path / "checkpoint-4")


def test_a_run_knows_its_whole_checkpoints(tmp_path):
    for step in (4, 8, 12):
        write(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-12" / "latest").unlink()
    (tmp_path / ".saving-16" / "checkpoint-16").mkdir(parents=True)
    run = RunDir(tmp_path)
    assert [step for step, _ in run.checkpoints()] == [4, 8, 12] and [step for step, _ in run.complete_checkpoints()] == [4, 8]


def test_remains_of_saves_and_deletions_are_removed_and_nothing_else(checkpoint):
    output = checkpoint.parent
    for name in (".saving-8/checkpoint-8", ".removing-checkpoint-2", ".other"):
        (output / name).mkdir(parents=True)
        (output / name / "file").write_text("x")
    removed = files.remove_remains(output)
    assert sorted(path.name for path in removed) == [".removing-checkpoint-2", ".saving-8"]
    assert sorted(path.name for path in output.iterdir()) == [".other", "checkpoint-4"] and not faults(checkpoint)


def test_a_checkpoint_that_only_lacked_its_name_gets_it(tmp_path):
    whole, torn = tmp_path / f"{files.SAVING}8" / "checkpoint-8", tmp_path / f"{files.SAVING}12" / "checkpoint-12"
    write(whole, step=8), write(torn, step=12)
    (torn / files.MANIFEST).unlink()
    kept = write(tmp_path / "checkpoint-4")
    write(tmp_path / f"{files.SAVING}4" / "checkpoint-4")  # its name is taken
    assert files.adopt_finished(tmp_path) == [tmp_path / "checkpoint-8"]
    assert [step for step, _ in RunDir(tmp_path).complete_checkpoints()] == [4, 8] and not faults(kept)
    files.remove_remains(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]


def test_a_deletion_that_is_cut_off_leaves_no_half_checkpoint(checkpoint, monkeypatch):
    def cut_off(path):
        (path / "latest").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        files.remove_checkpoint(checkpoint)
    assert RunDir(checkpoint.parent).checkpoints() == []
    monkeypatch.undo()
    write(checkpoint)
    files.remove_checkpoint(checkpoint)  # over what the first one left
    assert list(checkpoint.parent.iterdir()) == []


@given(count=st.integers(1, 8), limit=st.none() | st.integers(-1, 9), best=st.none() | st.integers(0, 7))
def test_what_save_total_limit_lets_go(tmp_path_factory, count, limit, best):
    folder = tmp_path_factory.mktemp("limit")
    checkpoints = [(step, folder / f"checkpoint-{step}") for step in range(count)]
    kept_best = folder / f"checkpoint-{best}" if best is not None and best < count else None
    gone = files.superfluous(checkpoints, limit, None if kept_best is None else str(kept_best))
    left = [path for _, path in checkpoints if path not in gone]
    assert checkpoints[-1][1] in left and (kept_best is None or kept_best in left)
    if limit is None or limit < 1:
        assert not gone
    else:
        protected = {checkpoints[-1][1], *([kept_best] if kept_best else [])}
        assert len(left) == min(count, max(limit, len(protected)))
        unprotected = [path for path in left if path not in protected]
        assert all(int(path.name[11:]) > int(other.name[11:]) for path in unprotected for other in gone)


def test_the_manifest_is_json_with_sorted_names(checkpoint):
    names = list(json.loads((checkpoint / files.MANIFEST).read_text())["files"])
    assert names == sorted(names) and files.MANIFEST not in names


def test_the_old_checkpoint_is_there_until_its_successor_has_its_name(tmp_path):
    old, new = tmp_path / "checkpoint-4", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    seen = []

    def take_the_name():
        seen.append((tmp_path / ".removing-checkpoint-4" / "file").read_text())
        new.rename(old)

    files.remove_checkpoint(old, take_the_name)
    assert seen == ["checkpoint-4"] and (old / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_file_that_cannot_be_looked_at_is_a_fault_of_its_own(tmp_path):
    files.write_json_atomic(tmp_path / files.MANIFEST, {"version": 1, "step": 1, "world_size": 1,
                                                        "files": {"a" * 300: {"bytes": 1, "sha256": ""}}})  # fmt: skip
    assert "cannot be read (File name too long)" in files.size_fault(tmp_path)
