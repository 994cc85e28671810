"""Places and secrets from the environment, read here and nowhere else.

PESC_STORE        directory of the store (default: ./store)
PESC_STORE_URL    where the store is served by HTTP, for links to report pages in the Prefect UI (default: no links)
PESC_REMOTE       where stores meet: s3://bucket/path, gs://bucket/path, or a directory (default: nowhere); its credentials come
                  from where s3fs and gcsfs look for them, never from here
PESC_VLLM         Python that has vLLM, for `pesc serve` and `evaluate.engine: vllm` (default: the one that runs)
PESC_COMMIT       git commit of an image, which has no checkout to ask
HF_TOKEN          read by huggingface_hub itself; never part of a recipe, a key or a manifest
"""

from __future__ import annotations

import os
from pathlib import Path


def store_root() -> Path:
    """Directory of the store."""
    return Path(os.environ.get("PESC_STORE") or "store")


def store_url() -> str | None:
    """Where the store is served by HTTP, without a slash at its end; None: nowhere."""
    return (os.environ.get("PESC_STORE_URL") or "").rstrip("/") or None


def remote_url() -> str | None:
    """Where the store's remote is, if it has one.  A placeholder that deploying has left in place counts as nothing."""
    url = os.environ.get("PESC_REMOTE", "").strip()
    return None if not url or url.startswith("{{") else url


def use_remote(url: str) -> None:
    """Let this process and its children use another remote than the environment says."""
    os.environ["PESC_REMOTE"] = url


def vllm_python() -> str | None:
    """The Python that has vLLM, or the directory of its environment; None: the running one."""
    return os.environ.get("PESC_VLLM") or None


def image_commit() -> str | None:
    """The commit that the image was built from."""
    return os.environ.get("PESC_COMMIT") or None
