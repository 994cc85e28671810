"""How long a run waits for a server that does not answer.

A flow's own state is worth waiting for: the client tries again for minutes (`[tool.prefect.client]` in pyproject.toml), so that a server
may be restarted in mid-run. A view in the UI is not: a training must not stand still for a progress bar.

Pitfall: `prefect.settings.temporary_settings` takes 40 ms, and progress comes many times a second; so the settings are made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from prefect.context import SettingsContext, get_settings_context
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, Settings

VIEW_RETRIES = 1
"""One more try, after two seconds: a connection that a server has closed meanwhile is no lost server."""


@contextmanager
def impatient() -> Iterator[None]:
    """Calls of Prefect's API inside fail soon when the server does not answer."""
    context = get_settings_context()
    with SettingsContext(profile=context.profile, settings=_impatient(_Identity(context.settings))):
        yield


class _Identity:
    """The same settings object, whatever is in it: comparing some hundred settings would take longer than making them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __hash__(self) -> int:
        return id(self.settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.settings is self.settings


@lru_cache(maxsize=8)
def _impatient(identity: _Identity) -> Settings:
    return identity.settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: VIEW_RETRIES})
