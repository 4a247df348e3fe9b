"""Merge fine-tuning adapters into model checkpoints, working on the weight files alone.

    import lora_merge
    result = lora_merge.merge("base", ["adapter"], "out")

The functions take the words of the command line as keyword arguments, print nothing, and raise the errors of
`lora_merge.errors`. torch is imported by the first call, not by this import.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

try:
    __version__ = _version("lora-merge")
except PackageNotFoundError:  # run from a source folder that is not installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from lora_merge.api import Progress, inspect, merge, plan
    from lora_merge.proving import verify
    from lora_merge.results import InspectedTensor, Inspection, MergedWeight, MergeResult, PlannedWeight, PlanResult
    from lora_merge.verification.integrity import Verification

__all__ = [
    "InspectedTensor", "Inspection", "MergeResult", "MergedWeight", "PlanResult", "PlannedWeight", "Progress",
    "Verification", "__version__", "inspect", "merge", "plan", "verify",
]  # fmt: skip

_HOMES = {"Verification": "lora_merge.verification.integrity", "verify": "lora_merge.proving"}
_HOMES |= dict.fromkeys(("Progress", "inspect", "merge", "plan"), "lora_merge.api")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lora_merge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "lora_merge.results")), name)
