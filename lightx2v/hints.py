"""What the name of a file tells that its header cannot. Hints only: people rename files."""

import re
from collections.abc import Mapping
from pathlib import Path

# Wan2.2's two experts share one layout. "noise" makes a word sure; without it the name must be of Wan2.2.
_NOISE = re.compile(r"(?<![a-z])(high|low)[-_ .]?noise(?![a-z])")
_BARE = re.compile(r"(?<![a-z])(high|low)(?![a-z])")
_WAN22 = re.compile(r"wan[-_ .]?2[-_ .]2|a14b")
_STEPS = re.compile(
    r"(?<!\d)\d{1,2}[-_ ]?steps?(?![a-z])|step[-_]?distill|lightning|turbo|causvid|self[-_ ]?forcing|accvid|fastwan|"
    r"(?<![a-z])dmd(?![a-z])"
)
_CFG = re.compile(r"cfg[-_]?distill")
_DISTILLED = re.compile(r"distill")
_TASK = re.compile(r"(?<![a-z0-9])(t2v|i2v|flf2v|ti2v)(?![a-z0-9])")


def expert_hint(path: Path) -> str | None:
    """ "high" or "low" noise by the name of a file, its folder or diffusers' transformer folders; None where unsaid."""
    names = [path.name.lower(), path.parent.name.lower()]
    for name in names:
        if len(said := set(_NOISE.findall(name))) == 1:
            return said.pop()
    if _WAN22.search(names[0]) and len(said := set(_BARE.findall(names[0]))) == 1:
        return said.pop()
    folder = path if path.is_dir() else path.parent
    if folder.name == "transformer_2":
        return "low"
    return "high" if folder.name == "transformer" and (folder.parent / "transformer_2").is_dir() else None


def distilled_hint(path: Path, metadata: Mapping[str, str], bare: str = "steps") -> str | None:
    """ "steps" for models distilled to few steps, "cfg" for those that only need no guidance; None where unsaid.

    bare: what the word "distilled" alone means in this family.
    """
    for told in (path.name.lower(), metadata.get("model_type", "").lower(), path.parent.name.lower()):
        for pattern, meaning in ((_STEPS, "steps"), (_CFG, "cfg"), (_DISTILLED, bare)):
            if pattern.search(told):
                return meaning
    return None


def task_hint(path: Path, metadata: Mapping[str, str]) -> str | None:
    """ "t2v", "i2v", ... where a layout serves several tasks and metadata or a name says which."""
    for told in (metadata.get("model_type", ""), path.name, path.parent.name):
        if found := _TASK.search(told.lower()):
            return found[1]
    return None
