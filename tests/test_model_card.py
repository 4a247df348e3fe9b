"""The model card of an output: what the hub reads of it, what people read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import small
from cards import CARD
from huggingface_hub import ModelCard

import lora_merge


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    small.write_adapter(tmp_path / "adapter", small.write_base(tmp_path / "base", shards=1))
    (tmp_path / "base" / "README.md").write_text(CARD)
    return tmp_path


def card(folder: Path) -> Any:
    """The card as the hub's own library reads it."""
    return ModelCard((folder / "README.md").read_text())


def named(desk: Path, trained_on: object, name: str = "adapter") -> None:
    """Let an adapter say what it was trained on."""
    (desk / name / "adapter_config.json").unlink()
    (desk / name / "adapter_model.safetensors").rename(desk / "kept")
    shutil.rmtree(desk / name)
    small.save_adapter(desk / name, {}, base_model_name_or_path=trained_on)
    (desk / "kept").rename(desk / name / "adapter_model.safetensors")


def test_what_the_hub_reads(desk: Path) -> None:
    named(desk, "org/the-base")
    (desk / "adapter" / "README.md").write_text("---\nlicense: mit\ndatasets: [org/tuning, org/corpus]\n---\n")
    lora_merge.merge(desk / "base", desk / "adapter", desk / "out", bits=4)
    read = card(desk / "out")
    assert read.data.to_dict() == {
        "base_model": "org/the-base", "base_model_relation": "finetune", "license": "other",
        "license_name": "llama3.1", "license_link": "https://example.org/LICENSE?v=1#terms", "language": ["en", "no"],
        "library_name": "transformers", "pipeline_tag": "text-generation", "datasets": ["org/corpus", "org/tuning"],
        "tags": ["lora-merge", "merge", "4-bit", "compressed-tensors"],
    }  # fmt: skip
    for words in ("`base` with `adapter`", "lora-merge base adapter OUT --bits 4\n", "license of `adapter`: `mit`"):
        assert words in read.content
    assert (desk / "out" / "README.base.md").read_text() == CARD


def test_what_people_read(desk: Path) -> None:
    small.write_adapter(desk / "ad|ap`ter", small.write_base(desk / "other"), seed=5)
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "keep": ["lm_head|x y"], "weight": [1, -0.5], "seed": 3}
    done = lora_merge.merge(desk / "base", [desk / "adapter", desk / "ad|ap`ter"], desk / "out", **options)
    text = card(desk / "out").text
    assert "- `adapter`, strength 1\n- `ad\\|ap'ter`, strength -0.5\n" in text
    command = "lora-merge base adapter 'ad|ap`ter' OUT --bits 4 --group-size 32 --seed 3 --keep 'lm_head|x y'"
    assert f"```bash\n{command} --weight 1.0 --weight -0.5\n```" in text
    assert "- `pack-quantized int4 group 32`: 4" in text
    total = done.kept
    assert (
        total and f"| all 4 together | | | {total.survival:.2f} | {total.projection:.2f} | {total.noise:.2f} |" in text
    )
    rows = [line for line in text.splitlines() if line.startswith("| `model.")]
    least = min(done.weights, key=lambda weight: weight.survival or 0.0)
    assert len(rows) == 4 and f"{least.survival:.2f}" in rows[0]
    assert str(desk) not in text


def test_a_plain_merge_has_no_table(desk: Path) -> None:
    lora_merge.merge(desk / "base", desk / "adapter", desk / "out")
    read = card(desk / "out")
    assert read.data.tags == ["lora-merge", "merge"] and "|---" not in read.text
    assert "4 weights merged, 4 tensors copied. What" in read.text and read.data.base_model is None


def test_a_conversion_is_quantized(desk: Path) -> None:
    snapshot = cached(desk, "base", "models--org--the-base")
    lora_merge.merge(snapshot, [], desk / "out", bits=8)
    data = card(desk / "out").data.to_dict()
    assert data["base_model"] == "org/the-base" and data["base_model_relation"] == "quantized"
    assert data["tags"] == ["lora-merge", "8-bit", "compressed-tensors"]
    assert "\n4 weights converted, 4 tensors copied. What" in card(desk / "out").text


def cached(desk: Path, name: str, repository: str, revision: str = "a" * 40) -> Path:
    """A folder as it lies in the hub's cache."""
    (desk / repository / "snapshots").mkdir(parents=True)
    return Path(shutil.move(desk / name, desk / repository / "snapshots" / revision))


def test_repositories_of_the_cache_are_a_merge(desk: Path) -> None:
    base = cached(desk, "base", "models--org--the-base")
    adapter = cached(desk, "adapter", "models--me--my-lora", "b" * 40)
    lora_merge.merge(base, adapter, desk / "out")
    read = card(desk / "out")
    assert read.data.base_model == ["org/the-base", "me/my-lora"] and read.data.base_model_relation == "merge"
    assert f"`org/the-base` at revision `{'a' * 40}`" in read.text
    assert "lora-merge org/the-base me/my-lora OUT\n" in read.text


@pytest.mark.parametrize(
    "trained_on",
    ["/home/me/llama", "./llama", "llama", "../a/b", "models/llama", "a/b/c", "out/checkpoint-500", "me/checkpoint-5",
     "C:\\llama\\b", "a b/c", "a/b\n", "-a/b", "a/..b", "x" * 200 + "/b", 7, None, ["a/b"], {"a": "b"}],
    ids=str,
)  # fmt: skip
def test_what_may_be_a_folder_is_no_base_model(desk: Path, trained_on: object) -> None:
    named(desk, trained_on)
    lora_merge.merge(desk / "base", desk / "adapter", desk / "out")
    data = card(desk / "out").data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data
    assert "home" not in (desk / "out" / "README.md").read_text()


def test_adapters_of_different_bases_name_none(desk: Path) -> None:
    shutil.copytree(desk / "adapter", desk / "other")
    named(desk, "org/one")
    named(desk, "org/two", "other")
    lora_merge.merge(desk / "base", [desk / "adapter", desk / "other"], desk / "out")
    assert card(desk / "out").data.base_model is None


def test_the_bases_card_as_it_is(desk: Path) -> None:
    lora_merge.merge(desk / "base", desk / "adapter", desk / "out", card="base")
    assert (desk / "out" / "README.md").read_text() == CARD
    assert not (desk / "out" / "README.base.md").exists()
    lora_merge.verify(desk / "out", base=desk / "base", adapters=desk / "adapter")
    (desk / "base" / "README.md").unlink()
    lora_merge.merge(desk / "base", desk / "adapter", desk / "second", card="base")
    assert not (desk / "second" / "README.md").exists()


def test_cards_of_earlier_merges_are_kept(desk: Path) -> None:
    lora_merge.merge(desk / "base", desk / "adapter", desk / "one")
    lora_merge.merge(desk / "one", desk / "adapter", desk / "two")
    lora_merge.merge(desk / "two", [], desk / "three", dtype="float16")
    names = ("README.md", "README.base.md", "README.base.base.md", "README.base.base.base.md")
    assert sorted(path.name for path in (desk / "three").glob("README*")) == sorted(names)
    assert (desk / "three" / names[1]).read_bytes() == (desk / "two" / names[0]).read_bytes()
    assert (desk / "three" / names[3]).read_text() == CARD
    assert card(desk / "three").data.license_name == "llama3.1"


def test_the_same_merge_gives_the_same_card(desk: Path) -> None:
    """Whatever the folder is called, and however often the merge was stopped."""
    lora_merge.merge(desk / "base", desk / "adapter", desk / "out", bits=4)
    blocks = 3

    def stop(name: str, nbytes: int, total: int) -> None:
        nonlocal blocks
        blocks -= 1
        if not blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(desk / "base", desk / "adapter", desk / "other", bits=4, progress=stop)
    lora_merge.merge(desk / "base", desk / "adapter", desk / "other", bits=4, resume=True, threads=1)
    for name in ("README.md", "lora_merge.json"):
        assert (desk / "out" / name).read_bytes() == (desk / "other" / name).read_bytes()
    lora_merge.verify(desk / "out")
    (desk / "out" / "README.md").write_text("changed")
    with pytest.raises(lora_merge.errors.VerificationError, match=r"README\.md"):
        lora_merge.verify(desk / "out")
