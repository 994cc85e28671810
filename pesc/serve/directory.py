"""What vLLM is given: the dense directory as it is, or the stand-alone form of a sparse one, out of links, in a temporary directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pesc.errors import ModelError
from pesc.models.tensor_files import TensorDirectory, symlink_file

_DIRECTORY, _TEMPLATE = "model", "chat_template.jinja"
_CODE_NAMERS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


class Place(Protocol):
    """A model that is there, such as a `pesc.model_argument.ModelPlace`."""

    @property
    def directory(self) -> Path:
        """A Hugging Face model directory."""
        ...

    @property
    def fields(self) -> Mapping[str, Any]:
        """config.json."""
        ...

    @property
    def template(self) -> str | None:
        """A chat template in place of the tokenizer's own."""
        ...


@dataclass(frozen=True)
class Served:
    """A directory for vLLM."""

    directory: Path
    runs_own_code: bool
    """Whether it needs the code that was made for it."""
    template: Path | None
    """A chat template instead of the tokenizer's."""


def make_served(place: Place, room: Path, cpu: bool, trust: bool) -> Served:
    """Prepare a model for vLLM inside the empty `room`.  cpu: whether vLLM is a build for CPUs.  trust: code in the model's files may run.

    Raises ModelError for weights that are pickles, missing or damaged, and for experts that are not those of config.json.
    """
    template = _write_template(place, room)
    if not str(place.fields.get("model_type", "")).startswith("pesc_"):
        _ = TensorDirectory(place.directory).specs
        return Served(place.directory, False, template)
    if not trust:
        _refuse_foreign_code(place)
    return Served(_make_sparse(place, room / _DIRECTORY, cpu), True, template)


def _write_template(place: Place, room: Path) -> Path | None:
    if place.template is None:
        return None
    (room / _TEMPLATE).write_text(place.template, encoding="utf-8")
    return room / _TEMPLATE


def _make_sparse(place: Place, directory: Path, cpu: bool) -> Path:
    """The remote-code export, whose adapters run in the way that fits the device (see the package's pitfall)."""
    from pesc.models.export import export_remote_code
    from pesc.models.upcycle import read_config, write_config

    directory.mkdir()
    export_remote_code(place.directory, directory, link=symlink_file)
    fields = read_config(directory)
    write_config(directory, fields | {"pesc": fields["pesc"] | {"dispatch": "auto" if cpu else "dense"}})
    return directory


def _refuse_foreign_code(place: Place) -> None:
    """The trust that vLLM is given covers all code that the directory names, so nothing but ours may be named."""
    for name in _CODE_NAMERS:
        path = place.directory / name
        try:
            fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ModelError(f"{path} is not JSON ({error}): write or download the directory again.") from None
        if "auto_map" in fields:
            raise ModelError(
                f"{path} names code of the model's own, which would run on this machine: read it, then give --trust-remote-code."
            )
