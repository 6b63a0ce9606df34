"""Step times of results files as an SVG, against what the chip's matrix units could do at best:

    python -m benchmarks.plot benchmarks/results/h100-forward.json --model wan2.1-14b docs/images/forward-14b.svg

A bar is the median of one forward pass, its fine line the least and the most. The same files give the same picture.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

# Measured on an H100 SXM at 700 W, TFLOP/s: cuBLAS bf16 and `torch._scaled_mm` fp8 (tensorwise, fast accumulation),
# M = 32760, N = K = 5120, median; dev/LOG.md.
CEILINGS = {"bf16": 797.0, "fp8": 1474.0}
COLOURS = {"lightx2v": "#2f7ed8", "diffusers": "#c98a1b", "comfyui": "#5f9e57"}
TITLES = {"lightx2v": "LightX2V", "diffusers": "diffusers", "comfyui": "ComfyUI"}
LABEL, CHART, VALUE, STEP, TOP, BAR = 300, 460, 110, 26, 78, 17  # pixels

STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 11px; fill: #59636e }
.title { font-size: 15px; font-weight: 600 }
.spread { stroke: #1f2328 } .ceiling { stroke: #cf3f4f; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .spread { stroke: #e6edf3 }
}
</style>"""


@dataclass(frozen=True)
class Bar:
    """One contestant; times in ms."""

    label: str
    engine: str
    ms: float
    least: float
    most: float


def matching(results: Iterable[dict[str, Any]], model: str, size: str, weights: str) -> list[dict[str, Any]]:
    """Those of one network at one size; raises ValueError where there is none, with what there is."""
    results = list(results)
    found = [r for r in results if (r["model"], r["size"], r["weights"]) == (model, size, weights) and r["rows"]]
    if not found:
        known = sorted({f"{r['model']} {r['size']} {r['weights']}" for r in results if r["rows"]})
        raise ValueError(f"no results of {model} {size} {weights}; there is {', '.join(known) or 'none'}")
    return found


def bars(results: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """What was timed, the fastest first; of rows that ran the very same kernels the first."""
    seen: set[str] = set()
    found = []
    for row in (row for result in results for row in result["rows"] if "ms" in row):
        kernels = row.get("kernels", {})
        same = json.dumps([row["engine"], row["quant"], kernels or row["name"]], sort_keys=True)
        if same in seen:
            continue
        seen.add(same)
        name = row["name"].replace("auto", kernels.get("attention", "auto"))
        found.append(Bar(name.replace("lightx2v", "LightX2V"), row["engine"], row["ms"], row["ms_min"], row["ms_max"]))
    return sorted(found, key=lambda bar: (bar.ms, bar.label))


def draw(results: list[dict[str, Any]], gpu: str) -> str:
    """The whole SVG."""
    first, rows = results[0], bars(results)
    ceilings = {name: first["tflop"] / rate * 1000 for name, rate in CEILINGS.items()}
    longest = max([*(bar.most for bar in rows), *ceilings.values()]) * 1.02
    height = TOP + STEP * len(rows) + 34
    width = LABEL + CHART + VALUE

    def x(ms: float) -> float:
        return round(LABEL + CHART * ms / longest, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(_title(first))}</title>",
        STYLE,
        f'<text class="title" x="8" y="22">{escape(_title(first))}</text>',
        f'<text class="small" x="8" y="40">One forward pass in seconds, {escape(gpu)}, random weights: '
        "less is better</text>",
    ]
    for name, ms in ceilings.items():
        end = TOP + STEP * len(rows) + 4
        parts.append(f'<line class="ceiling" x1="{x(ms)}" x2="{x(ms)}" y1="{TOP - 8}" y2="{end}"/>')
        words = f"all at {name}'s {CEILINGS[name]:.0f} TFLOP/s"
        parts.append(f'<text class="small" x="{x(ms)}" y="{TOP - 12}" text-anchor="middle">{words}</text>')
    for number, bar in enumerate(rows):
        parts += _bar(bar, TOP + STEP * number, x)
    legend = [name for name in COLOURS if any(bar.engine == name for bar in rows)]
    for number, name in enumerate(legend):
        left, bottom = 8 + 110 * number, height - 10
        parts.append(f'<rect x="{left}" y="{bottom - 10}" width="11" height="11" rx="2" fill="{COLOURS[name]}"/>')
        parts.append(f'<text class="small" x="{left + 16}" y="{bottom}">{TITLES[name]}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _bar(bar: Bar, top: int, x: Any) -> list[str]:
    middle = top + BAR / 2
    colour = COLOURS.get(bar.engine, "#808080")
    return [
        f'<text x="{LABEL - 8}" y="{top + 13}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect x="{LABEL}" y="{top}" width="{round(x(bar.ms) - LABEL, 1)}" height="{BAR}" rx="2" fill="{colour}"/>',
        f'<line class="spread" x1="{x(bar.least)}" x2="{x(bar.most)}" y1="{middle}" y2="{middle}"/>',
        f'<text x="{x(bar.most) + 6}" y="{top + 13}">{bar.ms / 1000:.2f} s</text>',
    ]


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['model']}, {result['width']}x{result['height']}, {result['num_frames']} frames"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", type=Path, nargs="+", help="files that benchmarks.h100 or `lightx2v bench --json` wrote, of one GPU"
    )
    parser.add_argument("svg", type=Path, help="the picture")
    parser.add_argument("--model", default="wan2.1-14b")
    parser.add_argument("--size", default="480p")
    parser.add_argument("--weights", default="hot")
    args = parser.parse_args(arguments)
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    gpus = {document.get("gpu") or document["processor"] for document in documents}
    if len(gpus) > 1:
        parser.error(f"results of {', '.join(sorted(gpus))} cannot be compared: give files of one of them")
    try:
        results = (result for document in documents for result in document["results"])
        found = matching(results, args.model, args.size, args.weights)
    except ValueError as error:
        parser.error(str(error))
    unfinished = args.svg.with_name(args.svg.name + ".part")
    unfinished.write_text(draw(found, gpus.pop()), encoding="utf-8")
    unfinished.replace(args.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
