"""The real model and the real rows, as for the data stages."""

from tests.data.conftest import real_conversations, smollm2

__all__ = ["real_conversations", "smollm2"]
