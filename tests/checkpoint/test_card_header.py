"""The header of a stranger's model card: known fields of the right shape, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from cards import CARD

from lora_merge.checkpoint.card_header import MAX_BLOCK, MAX_ITEMS, card_header


def header(tmp_path: Path, text: str | bytes) -> dict[str, tuple[str, ...]]:
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return card_header(tmp_path / "README.md")


def test_a_header_is_read(tmp_path: Path) -> None:
    assert header(tmp_path, CARD) == {
        "license": ("other",), "license_name": ("llama3.1",),
        "license_link": ("https://example.org/LICENSE?v=1#terms",), "language": ("en", "no"),
        "library_name": ("transformers",), "pipeline_tag": ("text-generation",), "datasets": ("org/corpus",),
    }  # fmt: skip
    assert header(tmp_path, "\ufeff---\r\nlicense: 'mit' # free\r\nlanguage: [en, de]\r\n---\r\n") == {
        "license": ("mit",), "language": ("en", "de"),
    }  # fmt: skip


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "", "license: mit", "---\nlicense: mit\n", "---\n---\nlicense: mit\n", "# x\n---\nlicense: mit\n---\n",
        f"---\n{BOMB}license: *i\n---\n", "---\nlicense: &x mit\nlanguage: *x\n---\n".replace("license", "other"),
        "---\nlanguage: [&x en, *x]\n---\n", f"---\nlicense: mit #{'x' * MAX_BLOCK}\n---\n",
        "---\nlicense: {a: b}\n---\n", "---\nlicense: [[mit]]\n---\n", "---\nlicense: null\n---\n",
        "---\nlicense:\n---\n", "---\nlicense: !!python/object/apply:os.system [x]\n---\n",
        "---\nlicense: \"a\\nb\"\n---\n", f"---\nlicense: {'m' * 100}\n---\n",
        f"---\nlanguage: [{'en, ' * MAX_ITEMS} de]\n---\n", f"---\nlanguage: {'[' * 5000}\n---\n",
        f"---\nlanguage: {'[' * 2000}{']' * 2000}\n---\n", f"---\nlanguage: [{'en,' * MAX_BLOCK}]\n---\n",
        "---\nlicense: 'mit\n---\n", "---\nlicense_link: javascript alert\n---\n", "---\ndatasets: [a/b/c]\n---\n",
        "---\npipeline_tag: [a, b]\n---\n", b"---\nlicense: \xff\xfe\n---\n", "---\nlicense: <script>\n---\n",
    ],
)  # fmt: skip
def test_a_header_that_says_nothing(tmp_path: Path, text: str | bytes) -> None:
    assert header(tmp_path, text) == {}


def test_a_broken_field_leaves_the_others(tmp_path: Path) -> None:
    assert header(tmp_path, "---\nlanguage: [en\nlicense: mit\ntags: *x\n---\n") == {"license": ("mit",)}


def test_no_card_at_all(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert card_header(tmp_path / "none.md") == {} == card_header(tmp_path / "folder")
