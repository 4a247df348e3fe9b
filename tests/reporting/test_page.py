"""The page of a record: complete, self-contained, and safe from whatever the record says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import records
from html_tree import Node, tree

from lora_merge.output.record import Record, RecordedFile, RecordedInput
from lora_merge.reporting.page import report_page
from lora_merge.results import StaysPlain, StoredAs

HOSTILE = "<script>alert(1)</script>\"'&<img src=http://x.y onerror=z>\u202e\x1b[31m\ud800.3.a`"


def page_of(record: Record) -> Node:
    return tree(report_page(record))


def rows(table: Node) -> list[list[str]]:
    return [[cell.text for cell in row.all("th") + row.all("td")] for row in table.one("tbody").all("tr")]


def heat(page: Node, measure: str) -> list[list[str]]:
    """Rows of a heat map: the layer, then a cell for each module."""
    return rows(page.by_id(f"panel-{measure}").one("table", "heat"))


def counted(page: Node) -> dict[str, int]:
    """Weights in each step of the first measure."""
    bars = page.by_id("layers").all("div", "bars")[0]
    return {row.all("span")[0].text: int(row.all("span", "n")[0].text) for row in bars.all("div")}


def test_the_parts_of_a_page() -> None:
    page = page_of(records.record([*records.dense(3), records.weight("lm_head.weight")]))
    assert [(section.attributes["id"], section.one("h2").text) for section in page.all("section")] == [
        ("layers", "By layer and module"), ("worst", "The 20 weights of which least is left"),
        ("sizes", "Sizes, and how weights are stored"), ("families", "Rounding and scales"),
        ("plain", "What stays plain, and why"), ("notes", "Notes"), ("made", "How it was made"), ("files", "Files"),
    ]  # fmt: skip
    assert page.one("h1").text == "Big-70B with style and facts"
    assert [tab.text for tab in page.all("label")] == ["Survival", "Projection", "Noise", "Change"]
    assert [mark.attributes["id"] for mark in page.all("input") if "checked" in mark.attributes] == ["show-survival"]
    assert heat(page, "survival") == [[str(layer)] + ["0.98"] * 7 for layer in range(3)]
    assert heat(page, "noise")[0] == ["0"] + ["0.70"] * 7 and heat(page, "change")[2] == ["2"] + ["5.0 %"] * 7
    heads = page.by_id("panel-survival").one("table", "heat").one("thead").all("th")
    assert [head.text for head in heads][1:4] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert "lora-merge Big-70B style facts OUT --bits 4 --weight 0.7 --weight 0.3" in page.by_id("made").text
    assert ["embeddings and heads", "lm_head.weight ", "2", "100 B", "10.0 %"] in rows(page.by_id("plain").one("table"))
    assert "1.0 kB" in page.by_id("sizes").text and "a note" in page.by_id("notes").text


def test_anchors_lead_somewhere_and_ids_are_one() -> None:
    page = page_of(records.record(records.mixture(2, 8)))
    ids = [node.attributes["id"] for node in page.walk() if "id" in node.attributes]
    assert len(set(ids)) == len(ids)
    assert {f"#{key}" for key in ids} >= {link.attributes["href"] for link in page.all("a")}
    assert {label.attributes["for"] for label in page.all("label")} <= set(ids)


@pytest.mark.parametrize(
    "weights", [records.dense(2), records.mixture(2, 4), [], None], ids=["dense", "moe", "none", ""]
)
def test_a_page_asks_for_nothing_and_runs_nothing(weights: Any) -> None:
    data = report_page(records.record(weights))
    page = tree(data)
    assert not {node.tag for node in page.walk()} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "img",
        "form",
    }
    named = {name for node in page.walk() for name in node.attributes}
    assert not [name for name in named if name.startswith("on") or name in ("src", "srcset", "action", "xlink:href")]
    assert all(node.attributes["href"].startswith("#") for node in page.walk() if "href" in node.attributes)
    policy = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for word in (b"http:", b"https:", b"url(", b"@import", b"javascript:", b"expression("):
        assert word not in data, word


def everywhere(text: str) -> Record:
    """A record that says `text` wherever it says something."""
    weights = [
        records.weight(f"model.layers.{layer}.{text}{number}.weight") for layer in range(2) for number in range(2)
    ]
    weights.append(records.weight(text, kinds=(text,), rounding=text, scales=text, format=text))
    return records.record(
        weights,
        version=text,
        job=text,
        inputs=tuple(RecordedInput(role, text, {text: {"size": 1, "sha256": text}}) for role in ("base", "adapter")),
        options={text: text, "keep": [text]},
        versions={text: text},
        notes=(text,),
        stored=(StoredAs(text, False, 3, 10), StoredAs(text, True, 3, 10)),
        plain=(StaysPlain(text, 1, 1, (text,)),),
        files={text: RecordedFile(1, text)},
    )


def outline(node: Node) -> list[Any]:
    return [(child.tag, sorted(child.attributes), outline(child)) for child in node.children if isinstance(child, Node)]


def test_texts_of_a_record_are_never_markup() -> None:
    """The page of a hostile record has the elements and attributes of a harmless one, and no others."""
    hostile, harmless = tree(report_page(everywhere(HOSTILE))), tree(report_page(everywhere("aa.3.bb/c/d/e_f_g_h")))
    for page in (hostile, harmless):
        for node in page.walk():  # names are broken at other places
            node.children = [child for child in node.children if not (isinstance(child, Node) and child.tag == "wbr")]
    assert outline(hostile) == outline(harmless)
    text = hostile.text
    assert "<script>alert(1)</script>" in text and "\\x1b[31m" in text and "\\u202e" in text
    assert not {character for character in text if not character.isprintable() and character != "\n"}


def places(body: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    entries = body.items() if isinstance(body, dict) else list(enumerate(body))[:1] if isinstance(body, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, -1e308, float("nan"), float("inf"), 10**400, "x", "", [], {}, [None], [[[]]], {"a": {}},
)  # fmt: skip


def test_a_value_of_any_kind_anywhere_is_a_page_or_no_record() -> None:
    weights = [*records.dense(2), *records.mixture(2, 2), records.weight("lm_head.weight")]
    text = json.dumps(json.loads(records.record(weights).sealed()))
    made = 0
    for path in [*places(json.loads(text))]:
        for odd in ODD:
            body = json.loads(text)
            inner = body
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = odd
            try:
                record = Record.from_json(body)
            except ValueError:
                continue
            tree(report_page(record))
            made += 1
    assert made > 200


@pytest.mark.parametrize("figures", [{"survival": 1e200, "noise": 1e300, "change_norm": 1e300}, {"survival": -1e9}])
def test_figures_beyond_reason_are_shown_short(figures: dict[str, float]) -> None:
    page = page_of(records.record([*records.dense(2), records.weight("model.layers.0.odd.weight", **figures)]))
    assert max(len(cell) for row in heat(page, "survival") for cell in row) <= 8


def test_every_weight_is_counted() -> None:
    weights = [
        *records.dense(4),
        *records.mixture(4, 8),
        records.weight("lm_head.weight"),
        records.weight("a.3.b", None),
    ]
    page = page_of(records.record(weights))
    assert sum(counted(page).values()) == len(weights) and counted(page)["not measured"] == 1
    (outside,) = [head.text for head in page.by_id("layers").all("h3") if "outside" in head.text]
    (caption,) = [one.text for one in page.by_id("panel-survival").all("caption")]
    assert outside == "2 weights outside of layers"
    assert caption.startswith(f"Survival of {len(weights) - 2} weights")


def test_names_without_end_are_counted_all_the_same() -> None:
    """Stacks, columns and layers that nobody could read are told in the table of the rest."""
    weights = [records.weight(f"s{stack}.{layer}.w{stack}") for stack in range(40) for layer in range(5)]
    weights += [records.weight(f"model.layers.{layer}.w{layer}.weight") for layer in range(99)]
    page = page_of(records.record(weights))
    shown = sum(len(panel.all("td")) for panel in [page.by_id("panel-survival")])
    assert shown and sum(counted(page).values()) == len(weights)
    captions = [int(one.text.split()[2]) for one in page.by_id("panel-survival").all("caption")]
    (outside,) = [int(head.text.split()[0]) for head in page.by_id("layers").all("h3") if "outside" in head.text]
    assert sum(captions) + outside == len(weights)


def test_a_lost_weight_stands_out() -> None:
    lost = "self_attn.k_proj"
    page = page_of(records.record(records.dense(6, lost=(3, lost))))
    table = page.by_id("panel-survival").one("table", "heat")
    (cell,) = table.all("td", "lost")
    row = next(row for row in table.one("tbody").all("tr") if cell in row.all("td"))
    column = table.one("thead").all("th")[1 + row.all("td").index(cell)]
    assert (row.one("th").text, column.text, cell.text) == ("3", lost, "0.04")
    verdict = page.one("div", "verdict")
    assert "bad" in verdict.classes and "✕" in verdict.text and "model.layers.3.self_attn.k_proj.weight" in verdict.text
    first = page.by_id("worst").one("tbody").all("tr")[0]
    assert "lost-row" in first.classes and "layers.3.self_attn.k_proj" in first.text
    assert len(page.by_id("worst").all("tr", "lost-row")) == 1 and counted(page)["✕ lost: below 0.30"] == 1
    assert "--min-survival 0" in page.by_id("made").text


def test_where_nothing_is_lost_nothing_stands_out() -> None:
    page = page_of(records.record(records.dense(6)))
    assert not page.by_id("panel-survival").one("table", "heat").all("td", "lost")
    assert not page.all("tr", "lost-row") and "bad" not in page.one("div", "verdict").classes
    assert "--min-survival" not in page.by_id("made").text


@pytest.mark.parametrize(("survival", "step"), [(0.96, "s0"), (0.3, "s3"), (0.2999, "s4"), (-1.0, "s4"), (1.0, "s0")])
def test_the_bar_of_what_is_lost_is_that_of_min_survival(survival: float, step: str) -> None:
    weights = [*records.dense(2), records.weight("model.layers.1.extra.weight", survival)]
    (cell,) = page_of(records.record(weights)).by_id("panel-survival").one("table", "heat").all("tr")[2].all("td")[7:]
    assert step in cell.classes and ("lost" in cell.classes) == (step == "s4")


def test_experts_are_told_by_worst_and_mean_and_one_by_one() -> None:
    page = page_of(records.record([*records.mixture(3, 20, lost=(1, 17)), *records.dense(3)]))
    table = page.by_id("panel-survival").one("table", "heat")
    assert [head.text for head in table.one("thead").all("th")][1:4] == [
        f"mlp.experts.*.{name}" for name in records.MLP
    ]
    (cell,) = table.all("td", "lost")
    assert cell.text == "0.040.92" and cell.one("small").text == "0.92"
    fold = page.by_id("panel-survival").one("details")
    assert "open" not in fold.attributes and "20 experts in 3 layers" in fold.one("summary").text
    assert len(fold.all("rect")) == 3 * 20 and len(fold.all("path", "cross")) == 1
    (found,) = [square.text for square in fold.all("rect") if "s4" in square.classes]
    assert found == "layer 1, expert 17: 0.04"
    strips = [drawn.attributes["aria-label"] for drawn in fold.all("svg") if "role" in drawn.attributes]
    assert strips[1] == "layer 1: 20 squares, 1 lost"


def test_more_experts_than_squares_share_them() -> None:
    page = page_of(records.record(records.mixture(9, 2048, lost=(8, 2047))))
    fold = page.by_id("panel-survival").one("details")
    assert len(fold.all("rect")) == 9 * 1024 and "2 experts" in fold.text
    assert [square.text for square in fold.all("rect", "s4")] == ["layer 8, expert 2046 to 2047: 0.04"]


def test_sixty_layers_of_128_experts_are_below_two_megabytes() -> None:
    page = report_page(records.record(records.mixture(60, 128)))
    assert len(page) < 2_000_000 and page.count(b"<rect ") == 60 * 128


def test_the_size_grows_in_a_straight_line() -> None:
    sizes = [len(report_page(records.record(records.mixture(layers, 64)))) for layers in (15, 60)]
    assert sizes[1] < 4.5 * sizes[0]


def test_a_plain_output_shows_what_changed() -> None:
    weights = [
        records.weight(f"model.layers.{layer}.q.weight", None, relative_change=0.02 * layer) for layer in range(8)
    ]
    page = page_of(records.record(weights, plain=()))
    assert [tab.text for tab in page.all("label")] == ["Change"]
    assert heat(page, "change")[7] == ["7", "14 %"] and not page.all("td", "lost")
    assert "rounding lost nothing" in page.one("div", "verdict").text
    assert page.by_id("worst").one("h2").text == "The 20 weights that changed most"


def test_a_conversion_and_records_that_say_little() -> None:
    converted = records.record([records.weight("model.layers.0.q.weight", None, kinds=(), relative_change=None)])
    inputs = converted.inputs[:1]
    page = page_of(records.record(converted.weights, inputs=inputs))
    assert page.one("h1").text == "Big-70B, converted" and "Converted: 1 weight," in page.one("div", "verdict").text
    empty = page_of(Record({}))
    assert "does not say what was merged" in empty.one("div", "verdict").text
    assert [section.attributes["id"] for section in empty.all("section")] == ["sizes", "made", "files"]
