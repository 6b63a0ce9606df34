"""What this machine has, and how the kernels' messages say it."""

import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch


def installed(distribution: str) -> str | None:
    """The version of what installers call by that name; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def importable(package: str) -> bool:
    """Whether a top-level module is there. It is not imported."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def version_reason(distribution: str, majors: frozenset[int]) -> str | None:
    """Why the installed version will not do, in words; None if its major version is one of these."""
    found = installed(distribution)
    if found is None:
        return f"nothing that is installed is called '{distribution}', so its version is not known"
    if not found.partition(".")[0].isdigit() or int(found.partition(".")[0]) not in majors:
        wanted = listed([f"{major}.x" for major in sorted(majors)])
        return f"needs {distribution} {wanted}, {found} is installed"
    return None


def sm_reasons(device: torch.device, low: tuple[int, int] | None, high: tuple[int, int] | None) -> list[str]:
    """Why the device's compute capability will not do, in words; both bounds are inclusive."""
    wanted = " to ".join(dict.fromkeys(f"sm_{major}{minor}" for major, minor in filter(None, (low, high))))
    wanted += " or newer" if high is None else "" if low else " or older"
    if device.type != "cuda" or torch.version.hip:
        return [f"needs an NVIDIA GPU ({wanted}), got {'ROCm' if torch.version.hip else device.type}"]
    sm = torch.cuda.get_device_capability(device)
    if (low and sm < low) or (high and sm > high):
        return [f"needs {wanted}, this GPU is sm_{sm[0]}{sm[1]}"]
    return []


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def listed(items: Iterable[str]) -> str:
    """a, b or c."""
    *first, last = items
    return f"{', '.join(first)} or {last}" if first else last
