"""Passes saved against PSNR, drawn from what `python -m demo.tradeoff --json FILE` kept:

    python -m demo.tradeoff_plot benchmarks/results/cpu-cache-tradeoff.json docs/images/cache-tradeoff.svg

The same file gives the same picture.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot import STYLE

COLOURS = {"TeaCache": "#2f7ed8", "MagCache": "#c98a1b", "fewer steps": "#808080"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 60, 64, 24, 56  # pixels
MOST_SAVED, LEAST_DB, MOST_DB = 0.9, 28.0, 60.0


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """Name -> (share saved, dB, label) of each setting, in order of what it saves."""
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in COLOURS}
    for row in rows:
        fewer = row["setting"].endswith(" steps")
        label = row["setting"].removesuffix(" steps") if fewer else f"{row['threshold']:g}"
        if row["skipped"]:
            found["fewer steps" if fewer else row["setting"]].append((row["skipped"], row["psnr_db"], label))
    return {name: sorted(points) for name, points in found.items()}


def draw(document: Mapping[str, Any]) -> str:
    """The whole SVG."""
    title = f"What skipping saves and costs at {document['steps']} steps"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{title}</title>",
        STYLE,
        f'<text class="title" x="8" y="22">{title}</text>',
        f'<text class="small" x="8" y="40">Small text-to-video model, {document["count"]} prompts; mean PSNR in dB to '
        "the clip without a cache. Numbers: thresholds, or steps.</text>",
    ]
    for db in range(30, 61, 10):
        parts += [
            f'<line stroke="#80808060" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(db)}" y2="{_y(db)}"/>',
            f'<text class="small" x="{LEFT - 8}" y="{_y(db) + 4}" text-anchor="end">{db} dB</text>',
        ]
    for share in (0, 0.2, 0.4, 0.6, 0.8):
        bottom = HEIGHT - BOTTOM + 18
        parts.append(f'<text class="small" x="{_x(share)}" y="{bottom}" text-anchor="middle">{share:.0%} saved</text>')
    for number, (name, points) in enumerate(curves(document["rows"]).items()):
        line = " ".join(f"{_x(saved)},{_y(db)}" for saved, db, _ in points)
        parts.append(f'<polyline fill="none" stroke="{COLOURS[name]}" stroke-width="2" points="{line}"/>')
        for saved, db, label in points:
            x, y, below = _x(saved), _y(db), 16 if name == "MagCache" else -8
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{COLOURS[name]}"/>')
            parts.append(f'<text class="small" x="{x}" y="{y + below}" text-anchor="middle">{label}</text>')
        left = LEFT + 130 * number
        parts.append(f'<circle cx="{left}" cy="{HEIGHT - 14}" r="5" fill="{COLOURS[name]}"/>')
        parts.append(f'<text class="small" x="{left + 10}" y="{HEIGHT - 10}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _x(share: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * share / MOST_SAVED, 1)


def _y(db: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (MOST_DB - db) / (MOST_DB - LEAST_DB), 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m demo.tradeoff_plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("svg", type=Path)
    args = parser.parse_args(arguments)
    unfinished = args.svg.with_name(args.svg.name + ".part")
    unfinished.write_text(draw(json.loads(args.results.read_text(encoding="utf-8"))), encoding="utf-8")
    unfinished.replace(args.svg)


if __name__ == "__main__":
    main()
