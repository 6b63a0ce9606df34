"""Wan2.2 A14B is two networks, one for high noise and one for low: whether two files are such a pair."""

from dataclasses import replace

from lightx2v.checkpoint import CheckpointError
from lightx2v.identify import CheckpointInfo


def require_pair(high: CheckpointInfo, low: CheckpointInfo) -> None:
    """Raises CheckpointError where two checkpoints cannot be the high- and low-noise expert of one model.

    The experts have one layout, so which is which is told from the names of the files, where they tell. Their depth may
    differ: each walks its own blocks.
    """
    if high.path.resolve() == low.path.resolve():
        raise CheckpointError(f"{high.path}: picked as both experts; pick the other expert's file for one of them")
    for role, info in (("high", high), ("low", low)):
        if info.spec.boundary is None:
            raise CheckpointError(
                f"{info.path}: picked as the {role}-noise expert, but is {info.spec.title}, a model of its own; "
                "load it with Load Model, or pick an expert of Wan2.2 A14B"
            )
    if high.spec != low.spec or high.config != replace(low.config, num_layers=high.config.num_layers):
        raise CheckpointError(
            f"{high.path} is {high.spec.title}, {low.path} is {low.spec.title}, and they differ in task or size; "
            "both experts must be of one model: pick both of T2V A14B or both of I2V A14B"
        )
    _check_hints(high, low)


def _check_hints(high: CheckpointInfo, low: CheckpointInfo) -> None:
    if (high.expert_hint, low.expert_hint) == ("low", "high"):
        raise CheckpointError(
            f"the experts are swapped by their names: {high.path.name} is picked for high noise, {low.path.name} for "
            "low; exchange the two"
        )
    if high.expert_hint is not None and high.expert_hint == low.expert_hint:
        said, wanted = high.expert_hint, "low" if high.expert_hint == "high" else "high"
        raise CheckpointError(
            f"{high.path.name} and {low.path.name} are both {said}-noise experts by their names; "
            f"pick the {wanted}-noise file for {wanted} noise"
        )
    for info, role, other in ((high, "high", "low"), (low, "low", "high")):
        if info.expert_hint == other:
            raise CheckpointError(
                f"{info.path.name} is a {other}-noise expert by its name, but is picked for {role} noise; "
                f"pick the {role}-noise file, or rename it if its name is wrong"
            )
