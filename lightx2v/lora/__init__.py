"""LoRAs: files of every dialect, onto any linear layer, with a report of what each of their tensors became."""

from lightx2v.lora.apply import Applied, apply_loras, change_loras, check_loras, remove_loras
from lightx2v.lora.branch import attach, detach, set_strength, share
from lightx2v.lora.dialects import LoraFile, is_lora, read_lora
from lightx2v.lora.matching import Coverage, match
from lightx2v.lora.merging import merge, restore
from lightx2v.lora.stack import EXPERTS, Lora, for_expert

__all__ = [
    "EXPERTS",
    "Applied",
    "Coverage",
    "Lora",
    "LoraFile",
    "apply_loras",
    "attach",
    "change_loras",
    "check_loras",
    "detach",
    "for_expert",
    "is_lora",
    "match",
    "merge",
    "read_lora",
    "remove_loras",
    "restore",
    "set_strength",
    "share",
]
