"""What looks like a secret, and how text that may hold one is shown."""

from __future__ import annotations

import os
import re

HIDDEN = "<hidden>"

_SHAPES = re.compile(
    r"""
    \bhf_[A-Za-z0-9]{16,}
    | \bapi_org_[A-Za-z0-9]{16,}
    | \bsk-(?:proj|ant|or|svcacct|admin)-[A-Za-z0-9_-]{16,}
    | \bsk-[A-Za-z0-9]{20,}
    | \b(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10,}
    | \b(?:AKIA|ASIA|AGPA|AROA|AIDA)[A-Z0-9]{12,}
    | \bAIza[A-Za-z0-9_-]{30,}
    | \b(?:gh[pousr]_|github_pat_|glpat-|pypi-AgE|dckr_pat_)[A-Za-z0-9_-]{16,}
    | \bxox[abeprs]-[A-Za-z0-9-]{10,}
    | \beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?
    | \b(?i:bearer)\s+(?=\S*[0-9])[A-Za-z0-9._~+/=-]{16,}
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----
    | (?<=://)[^\s/@:]*:[^\s/@]+(?=@)
    | (?i:\b(?:[A-Za-z0-9]+_)*(?:token|password|passwd|secret|api_?key|access_?key|private_?key)\s*[=:]\s*)(?=\S*[0-9])\S{8,}
    """,
    re.VERBOSE,
)
# A long unbroken run of capitals, small letters and digits is a token; names of models and folders break at - _ . or /.
_RUN = re.compile(r"(?<![A-Za-z0-9+/_.-])[A-Za-z0-9+]{40,}={0,2}(?![A-Za-z0-9+/_.-])")
_KEY = re.compile(
    r"(?i)(?:^|[_-])(?:token|password|passwd|passphrase|secret|credentials?|api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key)$"
)


def _is_token(run: str) -> bool:
    return all(any(test(char) for char in run) for test in (str.isupper, str.islower, str.isdigit))


def is_secret(text: str) -> bool:
    """Whether ``text`` holds something with the shape of a key, token or password."""
    return _SHAPES.search(text) is not None or any(_is_token(match.group()) for match in _RUN.finditer(text))


def is_secret_key(name: str) -> bool:
    """Whether a mapping key called ``name`` says that its value is a secret (``hub_token``, ``password``)."""
    return _KEY.search(name) is not None


def redact(text: str) -> str:
    """``text`` without secrets: what has the shape of one, and what an environment variable such as ``HF_TOKEN`` holds, is ``<hidden>``."""
    for value in _environment():
        text = text.replace(value, HIDDEN)
    text = _SHAPES.sub(HIDDEN, text)
    return _RUN.sub(lambda match: HIDDEN if _is_token(match.group()) else match.group(), text)


def _environment() -> list[str]:
    """Secrets of this process, the longest first. Short values would hide ordinary words."""
    found = {value for name, value in os.environ.items() if len(value) >= 8 and is_secret_key(name)}
    return sorted(found, key=len, reverse=True)
