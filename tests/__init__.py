"""Tests mirror the source tree; `architecture` holds what is true of the whole."""
