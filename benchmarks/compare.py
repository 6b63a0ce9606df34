"""`lightx2v bench` with other implementations beside the engine, on the very same weights:

python -m benchmarks.compare --model wan2.1-14b --quant none fp8 --attention all --peers diffusers comfyui
"""

import argparse
import sys

from benchmarks.peers import PEERS
from lightx2v.bench.command import add_arguments, run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser, PEERS)
    return run(parser.parse_args(arguments), PEERS)


if __name__ == "__main__":
    sys.exit(main())
