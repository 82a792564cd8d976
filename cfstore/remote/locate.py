"""Which addresses are stores on object storage, and with which settings their servers are spoken to.

Credentials never come from here: the client takes them from the variables, files and metadata services of each
cloud (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, ...).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cfstore.errors import StoreError

CLOUDS: Final = ("s3", "gs", "az")
PLAIN: Final = ("https", "http")
_URL: Final = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")
_SPOKEN_TO: Final = {
    "s3": ("AWS_ALLOW_HTTP", ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")),
    "az": ("AZURE_ALLOW_HTTP", ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")),
    "gs": ("GOOGLE_ALLOW_HTTP", ("GOOGLE_BASE_URL",)),
}
"""By scheme: the variable that allows requests without encryption, and those that name the server."""
_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles of ~/.aws are not looked at), or, where the bucket is "
    "public, AWS_SKIP_SIGNATURE=true",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or, where the bucket is public, GOOGLE_SKIP_SIGNATURE=true",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or, where the container is public, the name and "
    "AZURE_SKIP_SIGNATURE=true",
}
_TRUE: Final = ("1", "true", "yes", "on")


def is_url(text: str | Path) -> bool:
    """Whether `text` is the address of a store rather than a path: it begins as `s3://` does.

    A `Path` made of an address by mistake (one slash is left of the two) is none.
    """
    return isinstance(text, str) and bool(_URL.match(text))


def normal_url(text: str) -> str:
    """An address in its one spelling: scheme in small letters, no slash at the end.

    Raises
    ------
    StoreError
        The scheme is none of s3, gs, az, https and http; there is no bucket; or the address holds credentials, a
        query or a fragment, which messages and mirrors would carry on.
    """
    parts = urlsplit(text)
    scheme = parts.scheme.lower()
    if scheme not in CLOUDS + PLAIN:
        known = ", ".join(f"{name}://" for name in CLOUDS + PLAIN)
        message = f"{scheme}://: stores are read from folders and from {known}; name one of them"
        raise StoreError(message)
    if not parts.hostname:
        message = f"{text}: names no bucket or host; write {scheme}://BUCKET/FOLDER"
        raise StoreError(message)
    if parts.username or parts.password or parts.query or parts.fragment:
        shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        message = f"{shown}: credentials, '?' and '#' are no part of a store's address; set the cloud's variables"
        raise StoreError(message)
    folders = [folder for folder in parts.path.split("/") if folder]
    if any(folder in (".", "..") for folder in folders):
        message = f"{text}: has '.' or '..' in its path; write the address without"
        raise StoreError(message)
    return "/".join([f"{scheme}://{parts.netloc}", *folders])


def can_list(url: str) -> bool:
    """Whether the server can say what it holds; a plain web server cannot, and takes nothing either."""
    return urlsplit(url).scheme in CLOUDS


def allows_http(url: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether requests may go without encryption: to this machine itself, where an http address was given, or
    where AWS_ALLOW_HTTP, AZURE_ALLOW_HTTP or GOOGLE_ALLOW_HTTP says so.
    """
    scheme = urlsplit(url).scheme
    if scheme == "http":
        return True
    if scheme not in _SPOKEN_TO:
        return False
    allowing, endpoints = _SPOKEN_TO[scheme]
    if environment.get(allowing, "").lower() in _TRUE:
        return True
    return is_loopback(urlsplit(_first(endpoints, environment) or "").hostname or "")


def _first(names: Iterable[str], environment: Mapping[str, str]) -> str | None:
    return next((environment[name] for name in names if environment.get(name)), None)


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine: localhost, 127.x.x.x, ::1."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings_of(url: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the client must be told besides what it finds out itself: the endpoint and region of S3."""
    if urlsplit(url).scheme != "s3":
        return {}
    settings = {}
    if endpoint := _first(_SPOKEN_TO["s3"][1], environment):
        settings["endpoint"] = endpoint
    settings["region"] = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
    return settings


def credentials_of(url: str) -> str:
    """The variables that hold the credentials of a cloud, for messages."""
    return _CREDENTIALS[urlsplit(url).scheme]
