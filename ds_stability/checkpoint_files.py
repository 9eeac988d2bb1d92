"""Whether a checkpoint folder is whole: a manifest of sizes and SHA-256 hashes, written last.

    OUTPUT_DIR/.saving-N/checkpoint-N    while it is written; at the next start removed if writing was cut off, else renamed
    OUTPUT_DIR/checkpoint-N              renamed there after its manifest `checkpoint.json` was brought to disk
    OUTPUT_DIR/.removing-checkpoint-N    while an older one is deleted, so that half of one never counts as a checkpoint
    OUTPUT_DIR/.universal-N              checkpoint-N converted for another number of processes, until it is loaded

Every rank hashes its share of the files: `share` is (rank, number of ranks) throughout. No torch in here.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_stability.atomic import sync_directory, write_json_atomic
from ds_stability.errors import UserError

MANIFEST = "checkpoint.json"
VERSION = 1
SAVING, REMOVING, UNIVERSAL = ".saving-", ".removing-", ".universal-"
CHUNK_BYTES = 1 << 22
ALONE = (0, 1)
Files = dict[str, dict[str, Any]]  # path relative to the folder -> {"bytes": int, "sha256": str}


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder` but the manifest, relative to it, sorted."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def describe_files(folder: Path, names: list[str]) -> Files:
    """Size and hash of the files `names` in `folder`, each brought to disk."""
    return {name: _describe(folder / name) for name in names}


def write_manifest(folder: Path, files: Files, step: int, world_size: int) -> None:
    """Write `checkpoint.json` of all ranks' `files`. From here on the folder counts as whole; call it on rank 0, last."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_directory(path)
    record = {"version": VERSION, "step": step, "world_size": world_size, "files": dict(sorted(files.items()))}
    write_json_atomic(folder / MANIFEST, record)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.

    Raises:
        UserError: there is none (writing was cut off, or this is no checkpoint), or it cannot be read.
    """
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST}: writing it was cut off, or it is no checkpoint of ours") from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{folder / MANIFEST} cannot be read") from None
    if not _is_manifest(record):
        raise UserError(f"{folder / MANIFEST} is no checkpoint manifest of version {VERSION}")
    return record


def size_fault(folder: Path) -> str | None:
    """Why `folder` is no whole checkpoint, as far as its manifest and file sizes tell; None if it seems whole."""
    try:
        files = read_manifest(folder)["files"]
    except UserError as error:
        return str(error)
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    return None


def hash_fault(folder: Path, share: tuple[int, int] = ALONE) -> str | None:
    """As `size_fault`, by reading this rank's share of the files; None if they are what was written."""
    fault = size_fault(folder)
    if fault is not None:
        return fault
    files = read_manifest(folder)["files"]
    for name in sorted(files)[share[0] :: share[1]]:
        try:
            actual = _hash(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual != files[name]["sha256"]:
            return f"the content of {name} has changed since it was written"
    return None


def remove_checkpoint(folder: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Delete a checkpoint; what is left of an interrupted deletion is no checkpoint any more.

    Args:
        meanwhile: called when the name is free and the old content is still there (its successor takes the name).
    """
    doomed = folder.with_name(REMOVING + folder.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    meanwhile()
    sync_directory(folder.parent)
    shutil.rmtree(doomed)


def remove_remains(output_dir: Path) -> list[Path]:
    """Delete what interrupted saves and deletions left in `output_dir`; for the one process that holds the run's lock."""
    remains = sorted(path for path in output_dir.iterdir() if path.name.startswith((SAVING, REMOVING, UNIVERSAL)))
    for path in remains:
        shutil.rmtree(path)
    return remains


def adopt_finished(output_dir: Path) -> list[Path]:
    """Give checkpoints whose writing ended between their manifest and their name that name; for the holder of the lock."""
    adopted = []
    for folder in sorted(output_dir.glob(f"{SAVING}*/checkpoint-*")):
        target = output_dir / folder.name
        if not target.exists() and size_fault(folder) is None:
            folder.rename(target)
            adopted.append(target)
    return adopted


def superfluous(checkpoints: list[tuple[int, Path]], limit: int | None, best: str | None) -> list[Path]:
    """Which of `checkpoints`, by step, save_total_limit lets go: the oldest, but never the newest nor the best.

    Args:
        limit: how many to keep; None or a number below 1 keeps all. best: path of the best one, if there is one.
    """
    if limit is None or limit < 1:
        return []
    kept = {checkpoints[-1][1].name} | ({Path(best).name} if best is not None else set())
    candidates = [path for _, path in checkpoints if path.name not in kept]
    return candidates[: max(0, len(checkpoints) - max(limit, len(kept)))]


def _describe(path: Path) -> dict[str, Any]:
    digest = _hash(path)  # before the size: a file that still grows then has the wrong one
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _is_manifest(record: Any) -> bool:
    if not isinstance(record, dict) or record.get("version") != VERSION or not isinstance(record.get("files"), dict):
        return False
    if not all(isinstance(record.get(key), int) for key in ("step", "world_size")):
        return False
    return all(isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
               and not name.startswith("/") and ".." not in Path(name).parts
               for name, entry in record["files"].items())  # fmt: skip
