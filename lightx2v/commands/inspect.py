"""`lightx2v inspect`: what checkpoints are, from their headers."""

import argparse
import json
import sys
from pathlib import Path

from lightx2v.inspection import Inspected, inspect_file

UNKNOWN = 2  # exit status where a file could not be identified
SHOWN = 3  # names of missing weights that are written out


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", nargs="+", type=Path, help="files, an index of shards, or folders")
    command.add_argument("--json", action="store_true", help="one object, of several files a list of them")


def run(args: argparse.Namespace) -> int:
    """0 where every file was identified, else 2."""
    found = [inspect_file(path) for path in args.path]
    if args.json:
        objects = [each.as_json() for each in found]
        print(json.dumps(objects[0] if len(objects) == 1 else objects, indent=2))
    for each in found if not args.json else ():
        for line in lines(each):
            print(line, file=sys.stderr if each.kind == "unknown" else sys.stdout)
    return UNKNOWN if any(each.kind == "unknown" for each in found) else 0


def lines(each: Inspected) -> list[str]:
    """What is printed of a file."""
    if each.kind == "unknown":
        return [f"error: {each.notes[0]}"]
    told = {
        "kind": each.kind,
        "family": each.family,
        "task": each.task,
        "expert": each.expert,
        "format": each.format,
        "scheme": each.scheme,
        "layers": each.layers,
        "variant": each.variant,
    }
    numbers = f"{each.parameters / 1e6:,.1f} million parameters, {each.bytes / 1e6:,.1f} MB"
    first, *notes = each.notes
    listed = [f"{each.path}: {first}", "  " + ", ".join(f"{name} {value}" for name, value in told.items() if value)]
    listed += [f"  {line}" for line in (numbers, *notes)]
    if each.missing:
        more = f" and {len(each.missing) - SHOWN} more" if len(each.missing) > SHOWN else ""
        listed.append(f"  missing: {', '.join(each.missing[:SHOWN])}{more}: the file is incomplete")
    return listed
