"""Make a virtual environment with pip, also where Debian's python3-venv is not installed.

Debian ships python3 without `ensurepip`, so `python3 -m venv` fails there half-way. The venv
module itself is present; pip is then taken from the package index, its digest checked.

    python3 tools/make_venv.py .venv
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

OLDEST = (3, 11)


def fetch_pip(folder: Path) -> Path:
    """Download the newest pip wheel from the index (PIP_INDEX_URL, else PyPI) into `folder`."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    request = urllib.request.Request(f"{index}/pip/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    wheels = [
        file
        for file in files
        if file["filename"].endswith("-py3-none-any.whl")
        and not file.get("yanked")
        and file["filename"].split("-")[1].replace(".", "").isdigit()
    ]
    newest = max(wheels, key=lambda file: tuple(int(part) for part in file["filename"].split("-")[1].split(".")))
    with urllib.request.urlopen(newest["url"], timeout=120) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != newest["hashes"]["sha256"]:
        sys.exit(f"{newest['url']}: digest mismatch; try again")
    wheel = folder / newest["filename"]
    wheel.write_bytes(content)
    return wheel


def main(target: Path) -> None:
    if sys.version_info < OLDEST:
        sys.exit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed")
    with_pip = importlib.util.find_spec("ensurepip") is not None
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=with_pip).create(target)
    if not with_pip:
        python = target / "bin" / "python"
        with tempfile.TemporaryDirectory() as folder:
            wheel = fetch_pip(Path(folder))
            subprocess.run([python, f"{wheel}/pip", "install", "--no-index", wheel], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
