"""transformers' networks, imported where they are needed: that takes seconds, and only a load needs it."""

from typing import Any

import torch


def from_transformers(*names: str) -> tuple[Any, ...]:
    """Classes of transformers by name, the network last; ImportError that says what to install where it has none."""
    try:
        import transformers

        return tuple(getattr(transformers, name) for name in names)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"transformers' {names[-1]} cannot be imported ({error.__cause__ or error}); "
            f"install transformers >= 4.50, and torchvision (if any) in the build made for torch {torch.__version__}"
        ) from error
