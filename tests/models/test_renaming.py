"""Names that transformers' renamings lead astray."""

import re
from dataclasses import dataclass

import pytest

from lora_merge.models.renaming import CODE_PARTS, hidden, strays
from lora_merge.spec import Location


@dataclass
class Renaming:
    """As transformers has it: a pattern of stored names, and what becomes of it."""

    pattern: str
    new: str

    def rename_source_key(self, name: str) -> tuple[str, None]:
        return re.sub(self.pattern, self.new, name, count=1), None


@pytest.mark.parametrize(
    ("renaming", "module"),
    [
        (Renaming(r"^model\.", "model.language_model."), "model.language_model.layers.0.q"),
        (Renaming(r"_proj\.", "_proj.weight."), "layers.1.k_sconv.weight_proj"),
        (Renaming(r"\.mlp\.", ".mlp.mlp."), "layers.1.mlp.experts"),
    ],
)
def test_a_module_that_a_list_would_lose_gets_a_pattern(renaming: Renaming, module: str) -> None:
    found = hidden([renaming], [module, "untouched"])
    assert list(found) == [module] and re.fullmatch(found[module], module)
    assert renaming.rename_source_key(f"{found[module]}.")[0] == f"{found[module]}."


def test_codes_whose_weight_alone_is_renamed_are_found() -> None:
    places: dict[str, tuple[Location, ...]] = {
        f"{name}.weight": (Location(f"old.{name}.weight"),) for name in ("all", "mark", "any")
    }
    places |= {"same.weight": (Location("same.weight"),), "cut.weight": (Location("a.weight"), Location("b.weight"))}
    mapping = [
        Renaming(r"^old\.all\.", "all."), Renaming(r"^old\.mark\.weight$", "mark.weight"),
        Renaming(r"^old\.any\.weight", "any.weight"),
    ]  # fmt: skip
    linears = ["all", "mark", "any", "same", "cut", "absent"]
    assert strays(mapping, places, linears) == {"mark", "any"}  # the third loses qweight, scales and SCB
    assert {"weight_scale_inv", "qweight", "SCB"} <= set(CODE_PARTS)
