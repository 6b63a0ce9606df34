"""What the kernels' benchmarks share with `lightx2v bench`."""

from lightx2v.bench.timing import machine, median_ms, report

__all__ = ["machine", "median_ms", "report"]
