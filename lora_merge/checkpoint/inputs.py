"""Everything that a merge reads, opened together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from lora_merge.checkpoint.opening import Checkpoint, open_adapter, open_base
from lora_merge.request import Recipe


@dataclass(frozen=True, slots=True)
class Inputs:
    """The open inputs of a recipe. original: the folder that `--adapter-base` names."""

    base: Checkpoint
    adapters: tuple[Checkpoint, ...] = ()
    original: Checkpoint | None = None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that is read."""
        return [self.base, *self.adapters, *([self.original] if self.original else [])]

    @property
    def touched(self) -> int:
        """When an input was last touched: the latest ctime of its files, in nanoseconds."""
        return max(file.stamp[-1] for checkpoint in self.checkpoints for file in checkpoint.files)

    def check_unchanged(self) -> None:
        """InputError where a weight file that the output is made of was changed since it was opened."""
        for checkpoint in (self.base, *self.adapters):
            checkpoint.check_unchanged()


@contextmanager
def open_inputs(recipe: Recipe) -> Iterator[Inputs]:
    """Open base, adapters and original of a recipe. InputError where one of them is not what it should be."""
    with ExitStack() as files:
        base = files.enter_context(open_base(recipe.base))
        adapters = tuple(files.enter_context(open_adapter(path)) for path in recipe.adapters)
        original = files.enter_context(open_base(recipe.original)) if recipe.original else None
        yield Inputs(base, adapters, original)
