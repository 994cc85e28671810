"""The real model and the real rows, as for the data stages; the recipe of the flows."""

from tests.data.conftest import real_conversations, smollm2
from tests.flows.conftest import recipe_file

__all__ = ["real_conversations", "recipe_file", "smollm2"]
