"""What of a network its blocks are, and which of them move."""

from torch import nn


def spread(count: int, moving: int) -> tuple[int, ...]:
    """Which of `count` blocks move, evenly between the others, so that each copy has as much to hide behind."""
    return tuple(index for index in range(count) if (index + 1) * moving // count > index * moving // count)


def filed_blocks(count: int, filed: int, resident: int) -> tuple[int, ...]:
    """Which of `count` blocks are left in their file, where `resident` of them stay on the device.

    Those first, which are read once in a network's turn and not in each pass; then of those that move, evenly.
    """
    moving = spread(count, max(0, count - resident))
    staying = [index for index in range(count) if index not in moving]
    once = min(filed, len(staying))
    chosen = [staying[index] for index in spread(len(staying), once)]
    return tuple(sorted(chosen + [moving[index] for index in spread(len(moving), filed - once)]))


def parts_of(network: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks that a network walks, the one list of modules nearest to its top, and every module beside them.

    Raises ValueError for a network without such a list, or with several as near.
    """
    lists = _lists(network)
    if len(lists) != 1 or not len(lists[0]):
        raise ValueError(
            f"{type(network).__name__} has {len(lists)} lists of blocks, one was expected: it cannot be streamed"
        )
    inside = {id(module) for block in lists[0] for module in block.modules()}
    return list(lists[0]), [module for module in network.modules() if id(module) not in inside]


def streamable(network: nn.Module) -> bool:
    """Whether `parts_of` knows its blocks."""
    lists = _lists(network)
    return len(lists) == 1 and len(lists[0]) > 0


def _lists(network: nn.Module) -> list[nn.ModuleList]:
    level, lists = [network], list[nn.ModuleList]()
    while level and not lists:
        level = [child for module in level for child in module.children()]
        lists = [child for child in level if isinstance(child, nn.ModuleList)]
    return lists
