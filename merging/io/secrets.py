"""What must not be shown or saved: passwords, tokens and signatures in addresses and in what programs say of them."""

import os
import re
from collections.abc import Iterable
from urllib.parse import unquote

WITH_USER = (
    "abfs",
    "abfss",
    "az",
    "wasb",
    "wasbs",
    "adl",
    "hdfs",
    "webhdfs",
    "ssh",
    "sftp",
    "ftp",
    "smb",
    "git",
    "postgresql",
    "postgres",
    "mysql",
    "mariadb",
    "oracle",
    "mssql",
)
"""Protocols whose addresses may begin with `name@`: a container of Azure's, or a user without a password."""
_WORD = (
    r"[\w.%-]*(?:token(?!s|_id|_ind|_len|_count|iz)|secret|signature|passw|passphrase|pwd|credential|api-?_?key|(?:access|account)-?_?key"
    r"|private-?_?key|authori[sz]ation|session-?_?id|accessid|bearer|jwt|x-amz-|x-goog-)[\w.%-]*"
)
_VALUE = r"(\s*=\s*)([^&#;\s'\"<>)\]}]+)"
_QUERY = re.compile(rf"(?<![\w.%/-])({_WORD}|(?<=[?&#;])(?:sig|auth|key|pass|sas)){_VALUE}", re.IGNORECASE)
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(:/{1,2})([^/\s@'\"<>?#]*(?::[^\s@'\"<>/?#]*)?)@")
_PASSWORD = re.compile(r"(//)([^/\s@:'\"<>\[]*):(?!\d+/)([^\s'\"<>]*)@(?=[\w.\[-]+(?:[:/?#]|$))")
_BEARER = re.compile(r"\b(bearer|basic)(\s+)([A-Za-z0-9._~+/=-]{8,})", re.IGNORECASE)
_KNOWN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|glpat-[\w-]{16,}|xox[abp]-[\w-]{10,}"
    r"|A[KS]IA[0-9A-Z]{16}(?![0-9A-Za-z])|AIza[\w-]{35}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)
_VARIABLE = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PGPASS|API_?KEY|(ACCESS|ACCOUNT)_?KEY(_ID)?|CONNECTION_STRING|CREDENTIALS?)$"
)
"""How the names of environment variables end that hold a secret."""
SHORTEST = 8
"""Characters of a variable's value below which it is rather a word."""
HIDDEN = "***"
_named: set[str] = set()


def hide(values: Iterable[str]) -> None:
    """Has `redacted` hide these in this process: what variables hold that a user refers to, whatever they are called.

    Words and local paths stay as they are.
    """
    _named.update(value for value in values if len(value) >= SHORTEST and not value.startswith("/"))


def holds_secret(address: str) -> bool:
    """Whether an address holds a password, a token or a signature, at any level of nesting (`zip://…::https://…`).

    Paths of the local file system hold none: they are names.
    """
    if "://" not in address or (address.startswith("file://") and "::" not in address):
        return False
    return any(_secret_in(form) for form in _decoded(address))


def _decoded(address: str) -> set[str]:
    """An address as it stands, and with its percent signs resolved, once and twice."""
    once = unquote(address)
    return {address, once, unquote(once)}


def _secret_in(address: str) -> bool:
    if _PASSWORD.search(address):
        return True
    for protocol, _, user in _USER.findall(address):
        if ":" in user or (user and not _may_name_a_user(protocol)):
            return True
    start = re.search(r"[?#;]", address)
    return start is not None and _QUERY.search(address, start.start()) is not None


def _may_name_a_user(protocol: str) -> bool:
    return protocol.lower().partition("+")[0] in WITH_USER


def redacted(text: str) -> str:
    """A text in which passwords, tokens and signatures are replaced by asterisks, and what the environment holds of them.

    So is what `hide` was told.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and _VARIABLE.search(name) and not value.startswith("/"):
            text = text.replace(value, HIDDEN)
    for value in sorted(_named, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    if "@" in text:
        text = _PASSWORD.sub(rf"\1{HIDDEN}@", text)
        text = _USER.sub(_without_user, text)
    if "=" in text:
        text = _QUERY.sub(rf"\1\2{HIDDEN}", text)
    return _KNOWN.sub(HIDDEN, _BEARER.sub(rf"\1\2{HIDDEN}", text))


def _without_user(match: re.Match[str]) -> str:
    protocol, slashes, user = match.groups()
    keep = not user or (":" not in user and _may_name_a_user(protocol))
    return match[0] if keep else f"{protocol}{slashes}{HIDDEN}@"


def described(error: BaseException, limit: int = 2000) -> str:
    """Type and message of any error as they may be shown and saved: no secrets, and text that every file can hold."""
    try:
        message = str(error)
    except Exception:  # of somebody's own class
        message = "(its message cannot be read)"
    return storable(f"{type(error).__name__}: {message}", limit)


def storable(text: str, limit: int = 2000) -> str:
    """A text without secrets, without what UTF-8 cannot hold (lone surrogates, NUL), and not too long."""
    sound = text[: 4 * limit].encode("utf-8", "replace").decode().replace("\0", "?")
    return redacted(sound)[:limit]
