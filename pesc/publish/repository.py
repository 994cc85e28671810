"""A model repository of the hub: what is in it, sending what is missing, one commit, and looking again.

Key contracts
- The token is the hub client's own (HF_TOKEN, or `hf auth login`); nothing here holds or prints it.
- Files are sent before the commit and kept by the hub under their digests; the commit names them all at once, on top of the commit that
  was looked at.  Until then nobody sees anything, and what was sent need not be sent again.
- What is compared afterwards are digests that the hub lists with digests made here of the files, not with what the client said it sent.

Pitfalls
- With hf_xet installed the client knows no other way than Xet; a hub without it (a mirror, an older server) is asked first, and then served
  by plain large-file uploads.
- transformers prefers `model.safetensors` over shards, and an adapter's config over both: of an earlier model, these must go with the commit.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pesc.errors import CancelledError, PublishError
from pesc.publish.contents import Contents

log = logging.getLogger(__name__)

DEFAULT_BRANCH = "main"
_LARGE = 5_000_000
"""Bytes from which a file is sent alone, so that it can be counted as sent."""
_STALE = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write to it"
_HASHERS = 4


@dataclass(frozen=True)
class Digests:
    """What the hub calls the bytes of a file: SHA-256 in large-file storage, else the id of a git blob."""

    sha256: str
    git: str

    def equals(self, listed: Any) -> bool:
        """Whether the hub's entry of a file is of these bytes."""
        return self.sha256 == listed.lfs.sha256 if listed.lfs else self.git == listed.blob_id


@dataclass(frozen=True)
class Remote:
    """What the hub has."""

    commit: str
    """Empty when there is no such repository."""
    private: bool = False
    has_branch: bool = False
    files: Mapping[str, Any] = field(default_factory=dict)
    """Name -> the hub's entry; on a branch that is yet to be made, those of `main`, from which it starts."""


def check_name(repo: str) -> None:
    """Raises PublishError for what cannot be the name of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    kind, _, rest = repo.partition("/")
    if kind in ("datasets", "spaces") and "/" in rest:
        raise PublishError(f"--repo {repo} is no repository of models: a model is published as ORG/NAME, such as {rest}.")
    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise PublishError(
            f"--repo {repo} is no name of a model on the hub: give ORG/NAME, of letters, digits, `-`, `_` and `.`, such as my-team/llama-8x7b."
        )


def hash_files(contents: Contents, progress: Callable[..., None]) -> dict[str, Digests]:
    """The digests of every file, some read side by side."""
    done, total = 0, contents.num_bytes
    digests = {}
    with ThreadPoolExecutor(_HASHERS) as pool:
        for name, found in zip(contents.files, pool.map(lambda name: _hash_file(contents.directory / name), contents.files), strict=True):
            digests[name] = found
            done += contents.size(name)
            progress(done, total, unit="bytes", message=name)
    return digests


def _hash_file(path: Path) -> Digests:
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
            git.update(block)
    return Digests(sha256.hexdigest(), git.hexdigest())


class ModelRepository:
    """ORG/NAME on the hub, at one branch.  Raises PublishError, a sentence, whatever the hub or the network does."""

    def __init__(self, name: str, branch: str = DEFAULT_BRANCH, private: bool = False) -> None:
        check_name(name)
        self.name, self.branch, self.private = name, branch, private
        self._place: dict[str, Any] = {"repo_id": name, "repo_type": "model"}
        self._sent: list[str] = []
        self._to_send = 0
        self._committing = False

    @property
    def url(self) -> str:
        """The page of the branch."""
        from huggingface_hub.constants import ENDPOINT

        return f"{ENDPOINT}/{self.name}" + ("" if self.branch == DEFAULT_BRANCH else f"/tree/{self.branch}")

    def look(self, commit: str | None = None) -> Remote:
        """What is there, at the branch or at a commit."""
        from huggingface_hub import HfApi, errors, get_token

        if get_token() is None:
            raise PublishError(f"There is no token for the hub. {_LOGIN.replace('write to it', f'write to {self.name}')}.")
        api, branch = HfApi(), True
        with self._errors():
            try:
                info = api.repo_info(**self._place, revision=commit or self.branch, files_metadata=True)
            except errors.RevisionNotFoundError:
                info, branch = api.repo_info(**self._place, files_metadata=True), False
            except errors.RepositoryNotFoundError:
                self._check_no_other_kind(api)
                return Remote("")
        files = {item.rfilename: item for item in getattr(info, "siblings", None) or []}
        if self.private and not info.private:
            raise PublishError(
                f"{self.url} is public, and --private does not hide what is there: make it private in its settings, or leave out --private."
            )
        return Remote(info.sha or "", bool(info.private), branch, files)

    def _check_no_other_kind(self, api: Any) -> None:
        for kind, word in (("dataset", "data set"), ("space", "Space")):
            if api.repo_exists(self.name, repo_type=kind):
                raise PublishError(f"{self.name} is a {word} on the hub, not a model: choose another name with --repo.")

    def make(self) -> Remote:
        """The repository and the branch, made where they are not there."""
        from huggingface_hub import HfApi

        remote, api = self.look(), HfApi()
        with self._errors():
            if not remote.commit:
                api.create_repo(**self._place, private=self.private or None, exist_ok=True)
                remote = self.look()
            if not remote.has_branch:
                api.create_branch(**self._place, branch=self.branch, exist_ok=True)
                remote = self.look()
        return remote

    def send(self, contents: Contents, digests: Mapping[str, Digests], remote: Remote, message: str, say: Callable[[str], None]) -> str:
        """Bring the branch from `remote` to the contents; returns the commit, which is the old one when all is there already."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        changed = [name for name in contents.files if name not in remote.files or not digests[name].equals(remote.files[name])]
        removed = stale_files(remote, contents)
        if not changed and not removed:
            return remote.commit
        with self._errors():
            additions = {name: CommitOperationAdd(name, str(contents.directory / name)) for name in changed}
            self._send_large(additions, contents, say)
            self._committing = True
            info = HfApi().create_commit(
                **self._place,
                operations=[*additions.values(), *map(CommitOperationDelete, removed)],
                commit_message=message,
                revision=self.branch,
                parent_commit=remote.commit,
            )
        return info.oid

    def _send_large(self, additions: Mapping[str, Any], contents: Contents, say: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi

        large = [name for name in additions if contents.size(name) >= _LARGE]
        self._to_send = len(large)
        self._use_plain_uploads_without_xet()
        for number, name in enumerate(large, start=1):
            say(f"sending {name} ({number} of {len(large)} large files, {contents.size(name) / 1e6:,.0f} MB)")
            HfApi().preupload_lfs_files(**self._place, additions=[additions[name]], revision=self.branch, free_memory=False)
            self._sent.append(name)

    def _use_plain_uploads_without_xet(self) -> None:
        from urllib.parse import quote

        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session

        url = f"{constants.ENDPOINT}/api/models/{self.name}/xet-write-token/{quote(self.branch, safe='')}"
        if not constants.HF_HUB_DISABLE_XET and get_session().get(url, headers=build_hf_headers()).status_code == 404:
            log.info("this hub offers no Xet storage: plain large-file uploads")
            constants.HF_HUB_DISABLE_XET = True

    def check(self, contents: Contents, digests: Mapping[str, Digests], commit: str) -> None:
        """Raises PublishError when the hub does not list every file of the commit with the bytes that are here."""
        listed = self.look(commit).files
        missing = [name for name in contents.files if name not in listed]
        if missing:
            raise PublishError(
                f"The hub does not list {', '.join(missing)} in the commit {commit[:12]} of {self.name}: a .gitignore in the repository may exclude "
                "it. Remove that, and run again."
            )
        other = [name for name in contents.files if not digests[name].equals(listed[name])]
        if other:
            raise PublishError(
                f"The hub lists other bytes than are here for {', '.join(other)} in the commit {commit[:12]} of {self.name}: the directory was changed "
                "while it was sent, or something in between changes files. Run again."
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """The hub client's failures as sentences that say what has been sent."""
        try:
            yield
        except PublishError:
            raise
        except KeyboardInterrupt:
            raise CancelledError(f"Interrupted. {self._kept()}") from None
        except Exception as error:
            log.debug("hub failure", exc_info=error)
            raise PublishError(f"{self._sentence(error)} {self._kept()}") from None

    def _kept(self) -> str:
        again = "the same command, run again, goes on from there"
        if self._committing:
            return f"All files were sent, and whether the commit arrived is not known: {again}, and looks first."
        if not self._sent:
            return f"The repository is as it was; {again}."
        return f"{len(self._sent)} of {self._to_send} large files were sent and are kept by the hub, the repository is as it was; {again}."

    def _sentence(self, error: Exception) -> str:
        from huggingface_hub import errors

        http_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # of the HTTP library that this client uses
        for found in _chain(error):
            if isinstance(found, errors.HfHubHTTPError) and found.response is not None:
                return self._explain_status(found.response.status_code, found.server_message or "")
            if isinstance(found, errors.OfflineModeIsEnabled) or _is_offline():
                return f"{self.name} cannot be published: HF_HUB_OFFLINE is set. Unset it."
            if isinstance(found, (http_error, ConnectionError)):
                return f"{self.name} cannot be published: there is no network to the hub, or it was cut. Check the connection."
        return f"{self.name} cannot be published: {_one_line(error)}."

    def _explain_status(self, status: int, said: str) -> str:
        told = f" ({_one_line(said)})" if said else ""
        if status in (401, 403):
            return f"The hub refuses access to {self.name} (HTTP {status}){told}. {_LOGIN}."
        if status == 404:
            return f"The hub has no model {self.name}, or the token may not see it (HTTP 404). {_LOGIN}."
        if status == 412:
            return f"Somebody else changed {self.name} in the meantime (HTTP 412). Look at it, then run again."
        if status == 429:
            return "The hub says too many requests (HTTP 429). Wait some minutes and run again."
        if status >= 500:
            return f"The hub answered with HTTP {status}{told}. Run again later."
        return f"The hub does not take this (HTTP {status}){told}."


def stale_files(remote: Remote, contents: Contents) -> list[str]:
    """Files in the repository that would be loaded in place of the model's, or beside them."""
    return [name for name in remote.files if name not in contents.files and any(fnmatch.fnmatchcase(name, pattern) for pattern in _STALE)]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the deepest last."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _one_line(error: object) -> str:
    """The text of an error in one line, without the token, should it ever be in it."""
    from huggingface_hub import get_token

    text = " ".join(str(error).split()).rstrip(".")
    return text.replace(get_token() or "\0", "…")[:300]
