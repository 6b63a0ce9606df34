"""What is fast, by how much, and on which machine: `python -m benchmarks.kernels`, `python -m benchmarks.transformer`.

Every run checks the results first: no time is reported for an output that is wrong. The last line on stdout is one JSON
document; `--json FILE` keeps it, and `results/` holds the ones worth keeping.
"""
