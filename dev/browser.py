"""A Chromium for the tests of the page: find one, or install Debian's where that is possible without asking."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dev.environment import REPOSITORY

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_MAC = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_WINDOWS = ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")


def find_browser() -> Path | None:
    """The Chromium to drive: CHROMIUM_PATH if set, else the first that is installed, else None."""
    if configured := os.environ.get("CHROMIUM_PATH"):
        if not Path(configured).is_file():
            raise SystemExit(f"CHROMIUM_PATH is {configured}, which is not a file")
        return Path(configured)
    windows = [
        Path(os.environ.get(name, "C:/"), end) for name in ("PROGRAMFILES", "PROGRAMFILES(X86)") for end in _WINDOWS
    ]
    named = [Path(found) for name in _NAMES if (found := shutil.which(name))]
    return next((path for path in [*named, *map(Path, _MAC), *windows] if path.is_file()), None)


def fetch_browser() -> None:
    """Install Chromium where that needs no question: as root on Debian's kin. Says so where it cannot."""
    if find_browser():
        return
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("apt-get"):
        print(
            "No Chromium here, so the tests of the page will be skipped; install one, or set CHROMIUM_PATH.", flush=True
        )
        return
    print("Installing Chromium for the tests of the page ...", flush=True)
    log = REPOSITORY / ".cache" / "chromium.log"
    log.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with log.open("wb") as record:
        for line in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            status = subprocess.run(
                ["apt-get", *line], stdout=record, stderr=subprocess.STDOUT, env=environment
            ).returncode
    if status:
        print(f"apt-get could not install it ({log}), so the tests of the page will be skipped.", flush=True)
