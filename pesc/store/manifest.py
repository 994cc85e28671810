"""What is written beside a result: how it was made, from what, where, and what was measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_serializer

from pesc.redaction import redact_tree
from pesc.store.digest import digest_json

FORMAT = 1
"""Version of the fingerprint's layout; that of the store's is in `pesc.store.layout`."""
RUN_OBJECTS = "objects"
"""Folder beside a recipe's run records: what each run's actions gave, by digest, which a refresh may have replaced since."""


def _inside(path: str) -> str:
    """A relative path that stays in its folder."""
    if path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} would lie outside of its folder")
    return path


def _one_name(name: str) -> str:
    """The name of a directory, which leads nowhere else."""
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no name of a directory")
    return name


RelativePath = Annotated[str, AfterValidator(_inside)]
Name = Annotated[str, AfterValidator(_one_name)]
"""A stage, a fingerprint or a digest: the store makes paths of them, and a manifest may come from elsewhere."""


class Key(BaseModel):
    """Everything a fingerprint is made of.  Equal intent gives equal keys on every machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    stage: Name
    code_version: int
    config: dict[str, Any]
    """The stage's complete settings, defaults included."""
    inputs: dict[str, str]
    """Input name -> digest of its object (content, not upstream's fingerprint: equal bytes keep everything downstream)."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key's canonical JSON."""
        return digest_json(self.model_dump(mode="json"))


class ArtifactRef(BaseModel):
    """A finished action in under 1 KB: what Prefect caches and what stages hand to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Name
    fingerprint: Name
    digest: Name
    size_bytes: int


class OutputFile(BaseModel):
    """One file of the object."""

    path: RelativePath
    size: int
    sha256: str


class Output(BaseModel):
    """The object an action made."""

    digest: Name
    size_bytes: int
    files: list[OutputFile]


class Manifest(BaseModel):
    """The record of one action; its presence in the store is the commit."""

    model_config = ConfigDict(extra="forbid")

    address: str = Field(description="Address in the recipe that made it, e.g. train[pesc].")
    recipe: str
    fingerprint: Name
    key: Key
    input_fingerprints: dict[str, str] = Field(default_factory=dict, description="Input name -> fingerprint of the action that made it.")
    output: Output
    metrics: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict, description="Facts resolved while building: revisions, fall-backs, versions.")
    environment: dict[str, Any] = Field(default_factory=dict, description="Git commit, lock digest, package versions, hardware.")
    execution: dict[str, Any] = Field(default_factory=dict)
    sources_digest: str = Field(default="", description="Digest of the stage's normalised sources, finer than its code_version.")
    started_at: str
    seconds: float
    energy: dict[str, Any] | None = Field(default=None, description="joules of the GPUs by their own counters; None: not measured.")
    made_by: Literal["build", "adopt"] = "build"
    reason: str = Field(default="", description="Why an earlier result was adopted.")
    refreshed: bool = Field(default=False, description="Built although there was a result: it replaces that one in a remote too.")
    records: list[OutputFile] = Field(default_factory=list, description="What the build told of itself, beside the manifest: log, events.")
    prefect_run: str | None = None

    @field_serializer("metrics", "provenance", "environment", "execution", "reason")
    def _without_secrets(self, value: Any) -> Any:
        """What is written holds none; the key is left as it is, a recipe with a secret having been refused."""
        return redact_tree(value)

    @property
    def ref(self) -> ArtifactRef:
        """The short form."""
        return ArtifactRef(stage=self.key.stage, fingerprint=self.fingerprint, digest=self.output.digest, size_bytes=self.output.size_bytes)
