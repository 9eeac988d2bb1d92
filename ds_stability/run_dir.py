"""The directory of one training run: its paths and its manifest.

    manifest.json   command, resolved config, versions, git revision, seeds, hosts, data fingerprints
    metrics.jsonl   one line per optimizer step (recorder.py)
    tensorboard/    samples/step-00000200.jsonl    checkpoint-200/    final/
    DONE            written last, by rank 0, after a barrier: success is this file, not the exit code

Importing this module is cheap: no torch, no transformers.
"""

import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ds_stability.atomic import sync_directory, write_atomic, write_json_atomic
from ds_stability.checkpoint_files import size_fault
from ds_stability.errors import UserError
from ds_stability.safe_read import read_json

__all__ = ["RunDir", "build_manifest", "check_output_dir", "git_revision", "package_versions", "set_aside", "sync_directory", "utc_now",
           "write_atomic", "write_json_atomic"]  # fmt: skip

MANIFEST_VERSION = 1
PACKAGES = ("ds_stability", "torch", "deepspeed", "transformers", "accelerate", "datasets", "peft", "numpy", "scipy", "lm_eval")
GIT_TIMEOUT_SECONDS = 5


class RunDir:
    """Paths inside a run directory. Creates nothing until `create` is called."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.samples = self.path / "samples"
        self.final = self.path / "final"
        self.done = self.path / "DONE"

    def create(self) -> "RunDir":
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory) of every checkpoint-N, by step."""
        if not self.path.is_dir():
            return []
        matches = [(re.fullmatch(r"checkpoint-(\d+)", entry.name), entry) for entry in self.path.iterdir()]
        return sorted((int(match.group(1)), entry) for match, entry in matches if match and entry.is_dir())

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """`checkpoints` that are whole as far as file sizes tell (checkpoint_files.py)."""
        return [(step, path) for step, path in self.checkpoints() if size_fault(path) is None]

    def sample_file(self, step: int) -> Path:
        return self.samples / f"step-{step:08d}.jsonl"

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_json_atomic(self.manifest, manifest)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; UserError if it is missing or is not JSON."""
        try:
            manifest = read_json(self.manifest)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no manifest.json, so this is not the directory of a run") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.manifest}: cannot be read ({_reason(error)})") from None
        if not isinstance(manifest, dict):
            raise UserError(f"{self.manifest}: holds a {type(manifest).__name__}, not an object")
        return manifest

    def mark_done(self) -> None:
        """Write DONE. Call on rank 0 only, after a barrier, as the last write of the run."""
        write_atomic(self.done, utc_now() + "\n")


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def package_versions() -> dict[str, str | None]:
    """Installed version of Python and of each package that shapes a run; None where it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_revision(directory: str | os.PathLike | None = None) -> dict[str, Any] | None:
    """{"revision": commit id, "dirty": bool} of the repository around `directory` (default: here); None without one."""
    revision = _git(directory, "rev-parse", "--verify", "HEAD")
    status = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if revision is None or status is None:
        return None
    return {"revision": revision, "dirty": bool(status)}


def _git(directory: str | os.PathLike | None, *arguments: str) -> str | None:
    command = ["git", "-C", os.fspath(directory or "."), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def build_manifest(
    *,
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    seeds: Mapping[str, int],
    data: Mapping[str, Any],
    world_size: int,
    hosts: Sequence[str] | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What is needed to know, and to repeat, how a model was trained.

    Args:
        config: everything resolved, no None that means "default": arguments, DeepSpeed config, stability block.
        identity: what must agree for another process to continue this run (`check_output_dir` compares it): the model,
            the stability block and the data fingerprint. Paths in it should be absolute.
        seeds, data: seeds by use, and fingerprints by data set.
        hosts: one name per node (default: this host). command: argv (default: this process's).
    """
    return {
        "manifest_version": MANIFEST_VERSION,
        "started_at": utc_now(),
        "command": list(command if command is not None else sys.argv),
        "working_directory": os.getcwd(),
        "identity": dict(identity),
        "config": dict(config),
        "seeds": dict(seeds),
        "data": dict(data),
        "world_size": world_size,
        "hosts": list(hosts if hosts is not None else [socket.gethostname()]),
        "versions": package_versions(),
        "git": git_revision(),
    }


def check_output_dir(path: str | os.PathLike, resume: bool, identity: Mapping[str, Any] | None = None,
                     restart: bool = False) -> None:  # fmt: skip
    """Refuse an output directory that cannot be written, or that holds anything but the run to continue.

    Changes nothing on disk. Every rank may call it, but before rank 0 writes the manifest: on a new run the directory
    must be absent or empty.

    Args:
        restart: a new run may begin in a folder whose run has not come to its first checkpoint (`set_aside`).
        resume: continue the run in `path`. Its manifest's identity must then equal `identity` (None: not compared) in all
            that `identity` names.

    Raises:
        UserError: one line that names the directory, the reason and the flag to change.
    """
    run = RunDir(path)
    if (run.path.exists() or run.path.is_symlink()) and not run.path.is_dir():
        raise UserError(f"--output_dir {run.path}: is not a directory; give another --output_dir")
    _check_writable(run.path)
    occupied = run.path.is_dir() and any(run.path.iterdir())
    if not resume:
        if occupied and not (restart and _is_of_a_run(run)):
            what = "holds another run" if run.manifest.exists() else "is not empty and holds no run"
            advice = " or continue it with --resume_from_checkpoint true" if run.manifest.exists() else ""
            raise UserError(f"--output_dir {run.path}: {what}; give an empty or new --output_dir{advice}")
        return
    if not occupied:
        raise UserError(f"--output_dir {run.path}: nothing to resume from; leave out --resume_from_checkpoint")
    recorded = run.read_manifest().get("identity")
    if identity is not None:
        _check_identity(run, recorded if isinstance(recorded, dict) else {}, identity)


def _check_identity(run: RunDir, recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    found = difference({key: value for key, value in recorded.items() if key in identity}, identity)
    if found is not None:
        raise UserError(f"--output_dir {run.path}: {found}; give the same, or a new --output_dir")


def difference(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first setting that a recorded run has otherwise than this command, as text; None where all agree."""
    # Through JSON, so that a tuple given now equals the list that was read back.
    before, now = _flatten(recorded), _flatten(json.loads(json.dumps(dict(given))))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key, _ABSENT) != now.get(key, _ABSENT))
    if not changed:
        return None
    key = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"its run has {key} = {_show(before.get(key, _ABSENT))}, this command has {_show(now.get(key, _ABSENT))}{more}"


def _is_of_a_run(run: RunDir) -> bool:
    """Whether a run, and nothing else, has written into the folder, as far as one can tell."""
    return run.manifest.exists() or all(_KEPT.fullmatch(entry.name) for entry in run.path.iterdir())


def set_aside(run: RunDir, entries: Sequence[Path] | None = None) -> Path | None:
    """Move what a run left that died before its first whole checkpoint into attempt-K; None if it left nothing.

    For the process that holds the run's lock. Locks and earlier attempts stay where they are.

    Args:
        entries: what to move; None moves all that is there.
    """
    left = [entry for entry in run.path.iterdir() if not _KEPT.fullmatch(entry.name)] if entries is None else list(entries)
    if not left:
        return None
    number = 1
    while (target := run.path / f"attempt-{number}").exists():
        number += 1
    target.mkdir()
    for entry in sorted(left, key=lambda entry: entry == run.manifest):  # the manifest last: it says that this is a run
        entry.rename(target / entry.name)
    return target


_KEPT = re.compile(r".*\.lock|attempt-\d+|\.(saving|removing|universal)-.*|\..*\.tmp")
_ABSENT = object()


def _show(value: Any, limit: int = 80) -> str:
    text = "nothing" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit // 2 - 3]}...{text[-limit // 2 :]}"  # two paths may differ at their ends


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _check_writable(path: Path) -> None:
    # A real write: permission bits say nothing to root, on read-only mounts, or under quotas.
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"cannot be written ({_reason(error)})"
        raise UserError(f"--output_dir {path}: {reason}; give another --output_dir") from None


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())
