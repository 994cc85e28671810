"""Secrets stay out of what is written and shown.

    redact("GET https://ada:s3cret@host/x")     "GET https://***@host/x"
    find_secret("hf_...")                       "an access token", for the sentence of a recipe that is refused

What counts as a secret: the values of environment variables that are named like one (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY,
PREFECT_API_AUTH_STRING ...), passwords in URLs, what is handed to `remember`, and texts that have the form of a token.

Where it is applied, each in one place: every `PescError` (`pesc.errors`), what child processes print (`pesc.launch`), manifests when
they are committed (`pesc.store`), log records where a handler sends them on (`RedactingFilter`), and the artifacts of the Prefect UI
(`tasks.reporting`). A recipe is refused instead (`pesc.recipe`): its settings are in fingerprints, which nobody may change afterwards.

Pitfall: a value of five characters or fewer is not recognised; it would be found in every other word.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"
MIN_LENGTH = 6
"""Characters of a value that can be told from ordinary text."""
_TELLING_LENGTH = 16
"""Characters of a value that in a recipe can be no coincidence."""
_SECRET_WORDS = frozenset({"TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "APIKEY", "CREDENTIAL", "CREDENTIALS"})
_SECRET_PAIRS = frozenset(
    {("API", "KEY"), ("ACCESS", "KEY"), ("PRIVATE", "KEY"), ("ACCOUNT", "KEY"), ("AUTH", "STRING"), ("CONNECTION", "STRING")}
)
_NO_SECRET_ENDINGS = frozenset(
    {"FILE", "PATH", "DIR", "URL", "URI", "NAME", "TYPE", "TIMEOUT", "TTL", "EXPIRATION", "LENGTH", "LIMIT", "COUNT"}
)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|sk-[A-Za-z0-9]{20,}|sk-(?:proj|ant)-[\w-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|pn[ub]_[A-Za-z0-9]{20,}|pypi-AgEI[\w-]{20,})"
)  # fmt: skip
_URL_PASSWORD = re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]*://)(?:[^\s/'\"]*:[^\s/'\"]*)@", re.IGNORECASE)
_WEB_USER = re.compile(r"(?P<keep>\bhttps?://)[^\s/'\"@:]+@", re.IGNORECASE)
_URL_QUERY = re.compile(
    r"(?P<keep>[?&](?:X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|AWSAccessKeyId|Signature|sig|access_token"
    r"|auth_token|token|api_key|apikey|password)=)[^&\s'\"#]+",
    re.IGNORECASE,
)  # fmt: skip
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_HEADER = re.compile(r"(?P<keep>\b(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[^\s'\",}]+", re.IGNORECASE)
_OPTION = re.compile(r"(?P<keep>(?<!\S)--[\w-]*(?:api-key|token|password|secret|auth-string)[= ])\S+", re.IGNORECASE)
_VARIABLE = re.compile(
    r"(?P<keep>\b[A-Z][A-Z0-9_]*(?:_TOKEN|_API_KEY|_ACCESS_KEY|_PASSWORD|_SECRET|_AUTH_STRING)['\"]?\s*[=:]\s*['\"]?)[^\s'\",;]+"
)
_FORMS = ((_TOKEN, "an access token"), (_URL_PASSWORD, "a URL with a password"), (_WEB_USER, "a URL with a user or a token in front of its host"),
          (_URL_QUERY, "a URL with a signature or a token"), (_PRIVATE_KEY, "a private key"))  # fmt: skip
SECRET_PATTERN = rf"{_TOKEN.pattern}|://[^\s/'\"]*:[^\s/'\"]*@|\bhttps?://[^\s/'\"@:]+@"
"""A token or a URL with a password, for JSON schemas: no named groups."""
T = TypeVar("T")
_REMEMBERED: dict[str, str] = {}


def remember(name: str, value: str) -> None:
    """Treat a value as secret for the rest of this process: one that came from elsewhere than the environment."""
    _REMEMBERED[value] = name


def redact(text: str) -> str:
    """The text with `***` in place of every secret."""
    if known := _known_secrets(_values()):
        text = known.sub(HIDDEN, text)
    text = _TOKEN.sub(HIDDEN, text)
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\g<keep>{HIDDEN}@", text)
        text = _WEB_USER.sub(rf"\g<keep>{HIDDEN}@", text)
    if "-----BEGIN" in text:
        text = _PRIVATE_KEY.sub(HIDDEN, text)
    for form in (_URL_QUERY, _HEADER, _OPTION, _VARIABLE):
        text = form.sub(rf"\g<keep>{HIDDEN}", text)
    return text


def redact_tree(value: T) -> T:
    """JSON-like data with every text in it redacted, names of maps too."""
    done: Any = value
    if isinstance(value, str):
        done = redact(value)
    elif isinstance(value, Mapping):
        done = {redact_tree(name): redact_tree(item) for name, item in value.items()}
    elif isinstance(value, list | tuple):
        done = type(value)(redact_tree(item) for item in value)  # type: ignore[call-arg]
    return done


def redact_error(error: BaseException) -> None:
    """Redact what an error, its notes and its causes say, in place.  For errors that are not a PescError: those are clean."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(redact(item) if isinstance(item, str) else item for item in one.args)
        if notes := getattr(one, "__notes__", None):
            one.__notes__ = [redact(note) for note in notes]
        waiting += [one.__cause__, one.__context__]


def find_secret(text: str) -> str | None:
    """What kind of secret a text holds, without the secret; None when there is none."""
    for form, kind in _FORMS:
        if form.search(text):
            return kind
    for value, name in _values():
        if value in text and (len(value) >= _TELLING_LENGTH or value == text):
            return f"the value of {name}"
    return None


def find_secret_variable(name: str, value: str) -> str | None:
    """The same for the value of an environment variable, which may also be named like a secret."""
    return find_secret(value) or (f"a value that is named like a secret ({name})" if _secrets_of(name.upper(), value) else None)


class RedactingFilter(logging.Filter):
    """For handlers: redacts the message and the traceback of every record that passes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True: no record is held back."""
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit
            message = f"{record.msg} {record.args}"
        if (clean := redact(message)) != message or record.args:
            record.msg, record.args = clean, None
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = redact(record.exc_text or logging.Formatter().formatException(record.exc_info))
        return True


def redact_handlers(*loggers: logging.Logger) -> None:
    """Let every handler of these loggers redact from now on."""
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if not any(isinstance(present, RedactingFilter) for present in handler.filters):
            handler.addFilter(RedactingFilter())


def _values() -> tuple[tuple[str, str], ...]:
    """Every secret value that this process knows, with the name of where it is from; the longest first."""
    found = dict(_REMEMBERED)
    for name, value in os.environ.items():
        for secret in _secrets_of(name, value):
            found.setdefault(secret, name)
    return tuple(
        sorted(((value, name) for value, name in found.items() if len(value) >= MIN_LENGTH), key=lambda item: (-len(item[0]), item))
    )


@lru_cache(maxsize=2048)
def _secrets_of(name: str, value: str) -> tuple[str, ...]:
    """The secrets in one variable: its value when it is named like one, and the password of a URL."""
    return tuple(_iter_secrets(name.upper(), value))


def _iter_secrets(name: str, value: str) -> Iterator[str]:
    if "://" in value:
        for part in value.split():
            try:
                password = urlsplit(part).password
            except ValueError:
                continue
            if password:
                yield password
                yield unquote(password)
    words = name.split("_")
    if words[-2:] == ["WEBHOOK", "URL"] and value.strip():  # who has it can write to the channel
        yield value.strip()
    named = bool(_SECRET_WORDS & set(words)) or any(pair in _SECRET_PAIRS for pair in pairwise(words))
    is_path = value.startswith("/") and os.path.exists(value)
    if not named or words[-1] in _NO_SECRET_ENDINGS or is_path or not value.strip():
        return
    yield value.strip()
    if words[-2:] == ["AUTH", "STRING"]:
        yield value.partition(":")[2]


@lru_cache(maxsize=8)
def _known_secrets(values: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    """One expression for all values, also as they look in URLs, JSON and Basic authentication."""
    written: dict[str, None] = {}
    for value, _name in values:
        forms = (value, quote(value, safe=""), json.dumps(value)[1:-1], base64.b64encode(value.encode()).decode())
        written.update(dict.fromkeys(forms))
    if not written:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(written, key=len, reverse=True)))
