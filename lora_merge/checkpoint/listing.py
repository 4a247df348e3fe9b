"""Names in a folder that a user gave."""

from __future__ import annotations

import os
from pathlib import Path

from lora_merge.errors import InputError, printable


def listing(path: Path) -> list[str]:
    """Names in a folder, sorted."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        hint = "the link leads nowhere" if path.is_symlink() else "no such file or folder"
        raise InputError(f"{printable(path)}: {hint}; give the path of a folder on this machine") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{printable(path)}: cannot be opened as a folder or a regular file: {reason}") from error
