"""Places and secrets from the environment, read here and nowhere else.

PESC_STORE        directory of the store (default: ./store)
HF_TOKEN          read by huggingface_hub itself; never part of a recipe, a key or a manifest
"""

from __future__ import annotations

import os
from pathlib import Path


def store_root() -> Path:
    """Directory of the store."""
    return Path(os.environ.get("PESC_STORE") or "store")
