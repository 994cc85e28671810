"""The secrets of a run: from the worker's environment, else from Prefect Secret blocks; never from a recipe, never shown.

    HF_TOKEN          or a Secret block named hf-token
    WANDB_API_KEY     or wandb-api-key, and so on for each name in VARIABLES
    GOOGLE_APPLICATION_CREDENTIALS    or google-application-credentials with the JSON of a service account, for gs://

    with run_secrets(): ...       # children inherit the environment; what comes from a block is gone from it afterwards

A variable that is set wins over a block.  Blocks are asked for by these names alone: other secrets of the server are left where they are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

from pesc.redaction import redact_error, redact_handlers, remember
from pesc.store.remote import close_remotes

logger = logging.getLogger(__name__)
VARIABLES = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
"""What the hub, the trackers and the drivers of s3:// and gs:// read."""
FILES = {"GOOGLE_APPLICATION_CREDENTIALS"}
"""Variables that name a file: the block has what is in it."""


def block_name(variable: str) -> str:
    """`hf-token` for HF_TOKEN."""
    return variable.lower().replace("_", "-")


@contextlib.contextmanager
def run_secrets() -> Iterator[None]:
    """The secrets of a flow run in the environment, and none in its log or in the errors that leave it."""
    hide_secrets()
    added = {variable: value for variable, value in _from_blocks().items() if not os.environ.get(variable)}
    for variable, value in added.items():
        for text in (value, *_keys_in(value)):
            remember(f"the Secret block {block_name(variable)}", text)
    with _as_files(added) as variables:
        os.environ.update(variables)
        if variables:
            close_remotes()
        try:
            with clean_errors():
                yield
        finally:
            for variable in variables:
                os.environ.pop(variable, None)
            if variables:
                close_remotes()


@contextlib.contextmanager
def _as_files(given: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The variables, those of FILES with the path of a file that only this user can read and that is gone afterwards."""
    with contextlib.ExitStack() as stack:
        variables = dict(given)
        for variable in FILES & given.keys():
            if given[variable].lstrip().startswith("{"):  # else it is a path
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pesc-secret-"))  # 0700
                path = Path(folder) / "credentials.json"
                path.write_text(given[variable])
                variables[variable] = str(path)
        yield variables


def _keys_in(value: str) -> list[str]:
    """The private key in a document of Google's."""
    try:
        document = json.loads(value)
    except ValueError:
        return []
    return [document["private_key"]] if isinstance(document, dict) and isinstance(document.get("private_key"), str) else []


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """No secret in an error that leaves: Prefect makes its states' messages of them."""
    try:
        yield
    except Exception as error:
        redact_error(error)
        raise


def hide_secrets() -> None:
    """Let Prefect's handlers hide what they send, also what is known from a Prefect profile alone."""
    for name, setting in (("PREFECT_API_AUTH_STRING", PREFECT_API_AUTH_STRING), ("PREFECT_API_KEY", PREFECT_API_KEY)):
        value = setting.value()
        if value:
            remember(name, str(value))
            remember(name, str(value).partition(":")[2])
    redact_handlers(logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict)))


def _from_blocks() -> dict[str, str]:
    """What the server has for variables that are not set.  A server that refuses costs a warning: a run may do without."""
    wanted = {block_name(variable): variable for variable in VARIABLES if not os.environ.get(variable)}
    found = {}
    try:
        with get_client(sync_client=True) as client:
            there = client.read_block_documents_by_type("secret", include_secrets=False) if wanted else []
            for name in {document.name for document in there} & wanted.keys():
                value = client.read_block_document_by_name(str(name), "secret").data.get("value")
                value = json.dumps(value) if isinstance(value, dict) else value
                if isinstance(value, str) and value:
                    found[wanted[str(name)]] = value
    except Exception as error:
        redact_error(error)
        logger.warning("Prefect's Secret blocks cannot be read (%s: %s); the environment is all there is.", type(error).__name__, error)
    return found
