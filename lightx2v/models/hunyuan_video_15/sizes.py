"""The sizes and settings that HunyuanVideo-1.5 was trained with."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

CELL = 16  # pixels of a token, a side
WIDEST = 4.0  # proportions
# Between the areas of 480p, 640 x 640, and 720p, 960 x 960, which their names stand for.
LARGE = 640 * 960
# Shift by task, and whether the video is large (Tencent-Hunyuan/HunyuanVideo-1.5, README.md).
SHIFTS = {("t2v", False): 5.0, ("t2v", True): 9.0, ("i2v", False): 5.0, ("i2v", True): 7.0}


def usual(task: str, distilled: bool, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """What create_generator takes where nothing is said, beside what it is `asked`.

    distilled: whether the checkpoint needs no guidance.
    """
    area = asked.get("height", 480) * asked.get("width", 832)
    return {
        "num_frames": 121,
        "guidance_scale": 1.0 if distilled else 6.0,
        "sample_shift": SHIFTS[task, area > LARGE],
    }


def size_for_image(area: int, image: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of a video that starts with an image (height, width): the nearest of the sizes that
    fill a square of that area, of which the model has seen those of 640 and 960 pixels.

    Source: Tencent-Hunyuan/HunyuanVideo-1.5, hyvideo/utils/data_utils.py: the nearest that is no taller than an upright
    image, and no wider than another.
    """
    count = max(round(sqrt(area) / CELL), 1) ** 2  # tokens of a frame
    sizes = [
        (rows, columns)
        for columns in range(count, 0, -1)
        for rows in range(max(count // (columns + 1), 1), count // columns + 1)
        if max(rows, columns) <= WIDEST * min(rows, columns)
    ]
    upright, wanted = image[0] >= image[1], image[0] / image[1]

    def distance(size: tuple[int, int]) -> float:
        over = round(size[0] / size[1], 5) - wanted
        return abs(over) if (over <= 0 if upright else over >= 0) else float("inf")

    rows, columns = min(sizes, key=distance)
    return rows * CELL, columns * CELL
