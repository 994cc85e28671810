"""Answers whose characters are wrong: bytes read in another encoding, control characters, a script or language nobody asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from pesc.errors import DataError

_CONTROLS = bytes([*range(9), 11, *range(14, 32), 127])
"""C0 controls and DEL, without tab, line feed, form feed and carriage return."""
_CONTINUATION = "".join(chr(byte) for byte in range(0x80, 0xC0)) + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
"""What the bytes 80 to BF are shown as: Windows-1252, and C1 for the five that it leaves out (and for Latin-1)."""
_SUSPECT = re.compile("[\x80-\x84\x86-\x9f\xc2-\xf4\ufffd]")
_MOJIBAKE = re.compile(
    f"[\x80-\x84\x86-\x9f\ufffd]|[\xc2-\xdf][{_CONTINUATION}]|[\xe0-\xef][{_CONTINUATION}]{{2}}|[\xf0-\xf4][{_CONTINUATION}]{{3}}"
)

_SCRIPTS = {
    "Cyrillic": "\u0400-\u052f",
    "Hebrew": "\u0590-\u05ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc",
    "Indic": "\u0900-\u0dff",
    "Thai, Lao": "\u0e00-\u0eff",
    "Georgian": "\u10a0-\u10ff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7af",
    "Han, Kana": "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff",
}
_SCRIPT_LETTERS = {name: re.compile(f"[{letters}]") for name, letters in _SCRIPTS.items()}
_NOT_LATIN = re.compile(f"[{''.join(_SCRIPTS.values())}]")
_LATIN = re.compile("[A-Za-z\xc0-\u024f]")
_MIN_LETTERS = 20
_ASKS_FOR_LANGUAGE = re.compile(
    r"\b(?:translat|transliterat|tradu[cz]|übersetz|vertaal|language|dialect|alphabet|scripts?\b|characters?\b|hieroglyph|letters|unicode|utf"
    r"|emoji|multilingual|bilingual|foreign|native|lyrics|poem|haiku|anime|manga"
    r"|arabic|armenian|bengali|bulgarian|cantonese|chinese|farsi|georgian|greek|gujarati|hebrew|hindi|japan|kannada|kazakh|korea"
    r"|kyrgyz|malayalam|mandarin|marathi|mongol|nepal|pashto|persian|punjabi|russia|sanskrit|serbian|sinhala|slavic|tajik|tamil|telugu"
    r"|thai|tibetan|ukrain|urdu|uyghur|yiddish|macedonian|belarus|china|india|iran|israel|kanji|kana|hiragana|katakana|hangul|cyrillic)",
    re.IGNORECASE,
)

_MIN_LANGUAGE_CHARS = 200
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|https?://\S+", re.DOTALL)
_CODE_SIGNS = re.compile(r"[{}()\[\];=<>_]")


def has_bad_encoding(answer: str) -> bool:
    """Whether an answer holds UTF-8 that was read as Windows-1252 ("cafÃ©", "itâ€™s"), U+FFFD, or control characters.

    A character that shows a lead byte of UTF-8, followed by as many that show its other bytes, is no word of any language.
    """
    encoded = answer.encode("utf-8", "replace")
    if len(encoded.translate(None, _CONTROLS)) != len(encoded):
        return True
    return len(encoded) != len(answer) and bool(_SUSPECT.search(answer)) and bool(_MOJIBAKE.search(answer))


def has_foreign_script(answer: str, others: str) -> bool:
    """Whether most letters of an answer (20 or more) are of one script that is nowhere in `others`, and `others` ask for no language.

    Latin and Greek letters are never foreign: names and formulae are written in them everywhere.
    """
    if len(_NOT_LATIN.findall(answer)) < _MIN_LETTERS:
        return False
    counts = {name: len(letters.findall(answer)) for name, letters in _SCRIPT_LETTERS.items()}
    script = max(counts, key=lambda name: counts[name])
    if counts[script] < max(_MIN_LETTERS, 0.5 * (sum(counts.values()) + len(_LATIN.findall(answer)))):
        return False
    return not _SCRIPT_LETTERS[script].search(others) and not _ASKS_FOR_LANGUAGE.search(others)


def is_other_language(answer: str, languages: Sequence[str]) -> bool:
    """Whether an answer is surely in a language other than these (ISO 639-1 codes), by CLD2.

    Code, formulae and links are left out.  An answer with fewer than 200 characters besides them, one that looks like code without a fence,
    and one that CLD2 is not sure of are kept.
    Raises DataError when the package `pycld2` is not installed.
    """
    text = _CODE.sub(" ", answer)
    if len(text) < _MIN_LANGUAGE_CHARS or len(_CODE_SIGNS.findall(text)) * 30 > len(text):
        return False
    cld2 = _cld2()
    try:
        sure, _, found = cld2.detect(text)
    except cld2.error:  # characters it does not take
        return False
    code = found[0][1].split("-")[0]
    return bool(sure) and code != "un" and code not in languages


@cache
def _cld2() -> Any:
    try:
        import pycld2  # type: ignore[import-not-found]
    except ImportError:
        raise DataError(
            "The setting filters.languages needs the package pycld2: pip install -e '.[language]' in this project, or leave the setting out."
        ) from None
    return pycld2
