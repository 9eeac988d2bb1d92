"""The identity of training data: sha256 over bytes and reading options, independent of file names and places."""

import hashlib
import json
import os

from .spec import DataSpec

_CHUNK = 1 << 20
_SAMPLED = 1 << 20  # streamed files: this many bytes at both ends stand for the whole


def file_fingerprint(path: str, sampled: bool = False) -> str:
    """sha256 hex of a file's bytes, read in chunks; of its size and both ends if `sampled`."""
    digest = hashlib.sha256()
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if sampled and size > 2 * _SAMPLED:
            digest.update(str(size).encode() + file.read(_SAMPLED))
            file.seek(size - _SAMPLED)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def corpus_fingerprint(spec: DataSpec) -> str:
    """sha256 hex of the corpus that `spec` names: file bytes (both ends of streamed files), options, built-in text.

    A hub data set is identified by name, config, split and revision only; pass a commit hash as revision to pin it.
    """
    content = spec.to_dict()
    for key in ("train_files", "validation_files"):
        content[key] = [file_fingerprint(path, sampled=spec.streaming) for path in content[key]]
    if spec.dataset_name == "builtin:prose":
        from .builtin import prose_fingerprint

        content["text"] = prose_fingerprint()
    elif spec.dataset_name == "builtin:synthetic":
        from .synthetic import SyntheticLanguage

        content["text"] = SyntheticLanguage(seed=spec.synthetic_seed).fingerprint()
    for key in ("max_train_samples", "max_eval_samples", "shuffle_buffer", "packing", "truncation"):
        del content[key]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
