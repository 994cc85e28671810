"""Prefect's API as JSON, and what bootstrap keeps there: things with fields that are compared one by one.

A `Thing` knows its name, the fields it should have, and how it is read, made and changed.  Whoever has a list of them can say what
differs, and make it so; a field that is as it should be is never written.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL
from pydantic_core import to_jsonable_python

from deployments.fleet import BootstrapError
from pesc.redaction import redact

Json = dict[str, Any]
_SHOWN_CHARACTERS = 80


class Server:
    """The API at PREFECT_API_URL."""

    def __init__(self, client: SyncPrefectClient, url: str) -> None:
        self._client, self._url = client, url

    def get(self, path: str) -> Any:
        """An object; None if there is none."""
        try:
            return self._ask("GET", path, None)
        except PrefectHTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:
                return None
            raise _refused(path, error) from None

    def post(self, path: str, body: Any) -> Any:
        """Make an object, or ask for some."""
        return self._change("POST", path, body)

    def patch(self, path: str, body: Any) -> Any:
        """Change fields of an object."""
        return self._change("PATCH", path, body)

    def put(self, path: str, body: Any) -> Any:
        """Replace an object."""
        return self._change("PUT", path, body)

    def _change(self, method: str, path: str, body: Any) -> Any:
        try:
            return self._ask(method, path, body)
        except PrefectHTTPStatusError as error:
            raise _refused(path, error) from None

    def _ask(self, method: str, path: str, body: Any) -> Any:
        try:
            answer = self._client.request(method, f"/{path}", json=to_jsonable_python(body))  # type: ignore[arg-type]
        except PrefectHTTPStatusError as error:
            if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                raise BootstrapError(
                    f"The Prefect server at {self._url} wants a password. Set PREFECT_API_AUTH_STRING to what it was started with "
                    "(PREFECT_SERVER_API_AUTH_STRING, USER:PASSWORD)."
                ) from None
            raise
        except httpx.TransportError as error:
            raise BootstrapError(
                f"No Prefect server answers at {self._url} ({error}). Start it (prefect server start), or correct PREFECT_API_URL."
            ) from None
        return answer.json() if answer.content else None


def _refused(path: str, error: PrefectHTTPStatusError) -> BootstrapError:
    try:
        detail = error.response.json()
    except ValueError:
        detail = error.response.text
    if isinstance(detail, dict):
        detail = detail.get("detail") or detail.get("exception_detail") or detail.get("exception_message") or detail
    return BootstrapError(f"The Prefect server refuses {path} ({error.response.status_code}): {detail}")


@contextmanager
def connected() -> Iterator[Server]:
    """The server of this environment, or of the Prefect profile.  Raises BootstrapError if none is told or nobody answers there."""
    url = PREFECT_API_URL.value()
    if not url:
        raise BootstrapError(
            "PREFECT_API_URL is not set. Start a server (prefect server start) and export PREFECT_API_URL=http://HOST:4200/api; "
            "a temporary server would forget everything."
        )
    with SyncPrefectClient(url, auth_string=PREFECT_API_AUTH_STRING.value() or None) as client:
        server = Server(client, url)
        if server.get("admin/version") is None:
            raise BootstrapError(f"What answers at {url} is no Prefect API: the URL of a server ends with /api.")
        yield server


@dataclass(frozen=True)
class Difference:
    """A field of a thing that is not as it should be."""

    path: str
    found: Any
    wanted: Any

    def __str__(self) -> str:
        return f"{self.path} is {_shown(self.found)}, wanted {_shown(self.wanted)}"


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    text = redact(json.dumps(value, ensure_ascii=False, sort_keys=True))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


class _Absent:
    pass


ABSENT = _Absent()


def differences(found: Any, wanted: Any, path: str) -> Iterator[Difference]:
    """Every leaf that differs, with the way to it."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in dict.fromkeys([*wanted, *found]):
            yield from differences(found.get(name, ABSENT), wanted.get(name, ABSENT), f"{path}.{name}")
    elif found != wanted or isinstance(found, bool) is not isinstance(wanted, bool):
        yield Difference(path, found, wanted)


@dataclass
class Thing(ABC):
    """Something that the server keeps."""

    kind: ClassVar[str]
    name: str
    wanted: Json
    """Its fields as JSON; what is not in here belongs to the user or to the server."""
    secret: frozenset[str] = field(default=frozenset(), kw_only=True)
    """Fields whose values are not shown."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @abstractmethod
    def read(self, server: Server) -> Json | None:
        """Its fields as the server has them; None if it has no such thing."""

    @abstractmethod
    def make(self, server: Server) -> None:
        """Make it."""

    @abstractmethod
    def change(self, server: Server, fields: Json) -> None:
        """Give it these fields."""

    def compare(self, found: Json) -> list[Difference]:
        """The fields that differ."""
        result = []
        for name, wanted in self.wanted.items():
            faults = list(differences(found.get(name), wanted, name))
            result += [Difference(name, "…", "another")] if faults and name in self.secret else faults
        return result


@dataclass(frozen=True)
class Finding:
    """A thing that is missing or different."""

    thing: Thing
    differences: tuple[Difference, ...] | None
    """None: there is no such thing."""

    @property
    def fields(self) -> list[str]:
        """Names of the fields that differ."""
        return list(dict.fromkeys(difference.path.partition(".")[0] for difference in self.differences or ()))


def find(server: Server, things: Sequence[Thing]) -> Iterator[Finding]:
    """What is missing and what differs, each asked for when its turn comes."""
    for thing in things:
        found = thing.read(server)
        if found is None:
            yield Finding(thing, None)
        elif faults := thing.compare(found):
            yield Finding(thing, tuple(faults))


def mend(server: Server, finding: Finding) -> None:
    """Make the thing, or give it the fields that differ."""
    if finding.differences is None:
        finding.thing.make(server)
    else:
        finding.thing.change(server, {name: finding.thing.wanted[name] for name in finding.fields})
