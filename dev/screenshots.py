"""Writes the pictures of commands in docs/images: `python dev.py run -m dev.screenshots`.

In these, what is this machine's own is replaced: a CPU of 8 cores without optional packages, paths from the
repository's root. `... -m dev.screenshots --workflows` writes the pictures of workflows, from what
`python dev.py test tests/ui` leaves in out/ui.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from PIL import Image
from rich.console import Console
from rich.text import Text

from dev.environment import REPOSITORY
from lightx2v import doctor
from lightx2v.__main__ import main
from lightx2v.commands import doctor as command

IMAGES = REPOSITORY / "docs" / "images"
COLUMNS = 140
INSPECTED = ("variants/wan_i2v_fp8_scaled.safetensors", "loras/wan_t2v_night_lora_rank8.safetensors")
SHOTS = {
    "doctor": ("doctor",),
    "inspect": ("inspect", *(f"demo/models/{name}" for name in INSPECTED)),
}
PAGES = REPOSITORY / "out" / "ui"
CANVAS = (190, 165, 1420, 830)  # left, top, right, bottom of a page of 1600x1000 without what is ComfyUI's
LINES = 46  # of doctor, whose end is more of the same


def typical() -> doctor.Machine:
    """A newcomer's machine without a GPU."""
    packages = {name: None if name in doctor.OPTIONAL else told for name, told in doctor.machine().packages.items()}
    return replace(
        doctor.machine(),
        python="3.12.4",
        system="Linux",
        cores=8,
        ram=32 * 10**9,
        free_ram=24 * 10**9,
        driver=None,
        gpus=(),
        why_cpu="torch is built without CUDA",
        packages=packages,
    )


@contextlib.contextmanager
def at_root() -> Iterator[None]:
    before = Path.cwd()
    os.chdir(REPOSITORY)
    try:
        yield
    finally:
        os.chdir(before)


def printed(arguments: tuple[str, ...]) -> str:
    """What a command prints on that machine."""
    said = io.StringIO()
    with at_root(), patch.object(command, "machine", typical), contextlib.redirect_stdout(said):
        main(arguments)
    return said.getvalue()


def picture(name: str) -> str:
    """The SVG of one command and what it prints, cut to the width of a terminal."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ python -m lightx2v {' '.join(SHOTS[name])}", style="bold"))
    lines = printed(SHOTS[name]).splitlines()
    for line in lines[:LINES]:
        text = Text(line if len(line) <= COLUMNS else line[: COLUMNS - 3] + "...")
        text.highlight_regex(r"can run, self-test passed|yes, .*$|<- .*$", "green")
        text.highlight_regex(r"cannot run.*$|not installed.*$|no GPU.*$", "yellow")
        console.print(text)
    if len(lines) > LINES:
        console.print(f"... and {len(lines) - LINES} lines more")
    drawn = console.export_svg(title="lightx2v", unique_id=f"lightx2v-{name}")
    drawn = re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # which a page would fetch from elsewhere
    return re.sub(r"<!--.*?-->", "", drawn, flags=re.DOTALL)


def write_workflows() -> None:
    """docs/images/workflows/<name>.webp of every page in out/ui that shows a workflow."""
    for path in sorted((REPOSITORY / "workflows").glob("*.api.json")):
        page, target = PAGES / f"{path.name[:-9]}.png", IMAGES / "workflows" / f"{path.name[:-9]}.webp"
        Image.open(page).convert("RGB").crop(CANVAS).save(target, quality=55, method=6)
        print(target)


if __name__ == "__main__" and "--workflows" in sys.argv:
    write_workflows()
elif __name__ == "__main__":
    for name in SHOTS:
        (IMAGES / f"{name}.svg").write_text(picture(name), encoding="utf-8")
        print(IMAGES / f"{name}.svg")
