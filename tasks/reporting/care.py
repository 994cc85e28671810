"""What the care of the store has found."""

from __future__ import annotations

from tasks.reporting.artifacts import artifact_key, best_effort, write_markdown


@best_effort
def publish_note(key: str, title: str, lines: list[str]) -> None:
    """A title, and the lines below it as they are: digests and paths are long."""
    found = "\n".join(["```text", *(line.replace("```", "` ` `") for line in lines), "```"]) if lines else "Nothing to list."
    write_markdown(artifact_key(key), f"# {title}\n\n{found}\n", title)
