"""What a model is, in one digest: so that an adapter is not folded into another model of the same shape.

The digest is of every tensor's name, dtype, shape and a sample of its values, not of files: the same weights in other shards are the same model.
It reads some kilobytes of each tensor, so that a 70B model takes seconds.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pesc.models.tensor_files import TensorDirectory, read_sample

_SAMPLE_BYTES = 4096


def model_digest(model_dir: Path) -> str:
    """SHA-256, in hex.  Raises ModelError for a directory that is no model, or not whole."""
    weights, digest = TensorDirectory(model_dir), hashlib.sha256()
    for name in sorted(weights.specs):
        spec = weights.specs[name]
        digest.update(f"{name} {spec.dtype} {list(spec.shape)}\n".encode())
        digest.update(read_sample(model_dir / weights.files[name], name, _SAMPLE_BYTES))
    return digest.hexdigest()
