"""Merge fine-tuning adapters into model checkpoints, working on the weight files alone.

    import lora_merge
    result = lora_merge.merge("base", ["adapter"], "out")

The functions take the options of the command line as keywords, print nothing, and raise the errors of
`lora_merge.errors`. torch is imported by the first call, not by this import.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

try:
    __version__ = _version("lora-merge")
except PackageNotFoundError:  # run from a source folder that is not installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from lora_merge.progress import Progress
    from lora_merge.public import inspect, merge, plan, report, verify
    from lora_merge.results import (
        InspectedFormat,
        InspectedTensor,
        Inspection,
        MergedWeight,
        MergeResult,
        PlannedWeight,
        PlanResult,
        TotalSurvival,
        WrittenReport,
    )
    from lora_merge.verification.integrity import Verification

__all__ = [
    "InspectedFormat", "InspectedTensor", "Inspection", "MergeResult", "MergedWeight", "PlanResult", "PlannedWeight",
    "Progress", "TotalSurvival", "Verification", "WrittenReport", "__version__", "inspect", "merge", "plan", "report",
    "verify",
]  # fmt: skip

_HOMES = {"Progress": "lora_merge.progress", "Verification": "lora_merge.verification.integrity"}
_HOMES |= dict.fromkeys(("inspect", "merge", "plan", "report", "verify"), "lora_merge.public")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'lora_merge' has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_HOMES.get(name, "lora_merge.results")), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
