"""Fixtures of the flow tests, for these."""

from tests.flows.conftest import recipe_file  # noqa: F401
