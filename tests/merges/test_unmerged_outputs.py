"""Where PEFT's merge is not what was trained, the outputs of the model with the unmerged adapter are the judge."""

from pathlib import Path

import judges
import peft_cases
import pytest
import zoo
from peft_bench import Bench
from peft_cases import Case, lora
from peft_oracle import Adapter

from lora_merge.errors import UnsupportedError

EACH = pytest.mark.parametrize("case", peft_cases.UNMERGED, ids=lambda case: case.name)
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft")]


@EACH
def test_outputs_equal_the_unmerged_model(case: Case, tmp_path: Path) -> None:
    bench = Bench(case, "float32", tmp_path)
    expected = zoo.outputs(bench.unmerged(), case.model)
    base = zoo.outputs(zoo.open_saved(bench.base, case.model), case.model)
    judges.accept_logits(bench.outputs(bench.out), expected, base)
    assert set(zoo.disk_tensors(bench.out)) == set(zoo.disk_tensors(bench.base)) | case.added
    assert judges.config_changes(bench.base, bench.out) == dict(case.config)


@EACH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_the_float32_merge_rounded_once(case: Case, dtype: str, tmp_path: Path) -> None:
    """The float32 merge of the same, widened base is judged by its outputs; rounding it must give the 16-bit merge."""
    wide = Bench(case, dtype, tmp_path / "wide", upcast=True)
    expected = zoo.outputs(wide.unmerged(), case.model)
    base = zoo.outputs(zoo.open_saved(wide.base, case.model), case.model)
    judges.accept_logits(wide.outputs(wide.out), expected, base)
    bench = Bench(case, dtype, tmp_path / "narrow")
    found = zoo.disk_tensors(bench.out)
    rounded = {name: value.to(found[name].dtype) for name, value in zoo.disk_tensors(wide.out).items()}
    judges.accept(judges.distance(found, rounded, zoo.disk_tensors(bench.base)), dtype)
    zoo.open_saved(bench.out, case.model)


@pytest.mark.parametrize("adapter", [lora(["lm_head"]), lora(["shared"]), lora(["q"], modules_to_save=["lm_head"])])
def test_t5_is_not_untied(adapter: tuple[Adapter, ...], tmp_path: Path) -> None:
    """Its flag also says how the decoder's output is scaled, so a stored head could not be used as it was trained."""
    bench = Bench(Case("t5", "t5", adapter), "float32", tmp_path)
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight.*tie_word_embeddings"):
        _ = bench.out
    assert not (tmp_path / "out").exists()
