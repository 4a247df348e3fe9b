"""Every layout of files with adapters of both generations of names: the merge computes what the unmerged model does.

The judge is PEFT's unmerged model. Where PEFT drops tensors of such an adapter, it gets the same function in names that
it keeps.
"""

from pathlib import Path

import judges
import layout_cases
import pytest
import zoo
from peft_bench import Bench
from peft_cases import Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.mark.parametrize("case", layout_cases.CASES, ids=lambda case: case.name)
def test_merge_computes_what_was_trained(case: Case, tmp_path: Path) -> None:
    bench = Bench(case, "float32", tmp_path)
    expected = zoo.outputs(bench.unmerged(), case.model)
    base = zoo.outputs(zoo.open_saved(bench.base, case.model), case.model)
    judges.accept_logits(bench.outputs(bench.out), expected, base)
    assert set(zoo.disk_tensors(bench.out)) == set(zoo.disk_tensors(bench.base))


def test_the_table_crosses_layouts_and_names() -> None:
    names = {case.name for case in layout_cases.CASES}
    assert len(names) == len(layout_cases.CASES) >= 65
