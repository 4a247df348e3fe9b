"""Values of every wrong type and size at the keys that are read: a sample of what `benchmarks/wrong_types.py` runs."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import transformers
import wrong_type_cases as wt
import wrong_type_subjects as subjects
from recorded_keys import recorded

import lora_merge
from lora_merge.checkpoint import opening
from lora_merge.containers import json_file as jsonfile
from lora_merge.errors import AdapterError, NumericError
from lora_merge.request import STRONGEST

EACH = 8
SEED = 7


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


@pytest.mark.filterwarnings("ignore")  # of transformers, of values that are ours
@pytest.mark.parametrize("name", subjects.names())
def test_sampled(name: str, tmp_path: Path) -> None:
    subject = subjects.subject(tmp_path, name)
    outcomes = [
        wt.run(case, tmp_path / "case", merging=number % 3 == 0)
        for number, case in enumerate(wt.sample(subject, EACH, SEED))
    ]
    assert [f"{outcome.case}\n{outcome.fault}" for outcome in outcomes if outcome.fault] == []


FOUND: tuple[tuple[str, str, tuple[str, ...], object, int], ...] = (
    # what the whole run has found, one of each
    ("llama_tied", "config.json", ("model_type",), ["llama"], 3),
    ("chatglm1_int4", "config.json", ("vocab_size",), [], 3),
    ("llama", "config.json", ("tie_word_embeddings",), "yes", 3),
    ("repeated", "config.json", ("model_type",), [0], 3),
    ("gptq_4b_g32_sym_v1", "config.json", ("quantization_config", "meta", "quantizer"), True, 3),
    ("ct_W4_g32", "config.json", ("quantization_config", "config_groups", "group_0", "weights", "actorder"), [0], 0),
    ("ct_W8A8", "config.json", ("quantization_config", "config_groups", "group_0", "targets"), ["re:("], 3),
    ("ct_W8A8", "config.json", ("quantization_config", "config_groups", "group_0", "targets"), ["re:(.+)+!"], 3),
    ("autoround_w4g32", "config.json", ("quantization_config", "extra_config"), [1], 3),
    ("gptq_4b_g32_sym_v1", "config.json", ("quantization_config", "modules_in_block_to_quantize"), [None], 3),
    ("fp8_block128", "config.json", ("quantization_config", "modules_to_not_convert"), 1, 3),
    ("modelopt/nvfp4", "config.json", ("quantization_config", "ignore"), "lm_head", 3),
    ("llama", "adapter_config.json", ("alpha_pattern",), {"q_proj": wt.HUGE}, 3),
    ("llama", "adapter_config.json", ("alpha_pattern",), {"q_proj": 10**300}, 4),
    ("llama", "adapter_config.json", ("lora_alpha",), 1e308, 4),
    ("llama", "adapter_config.json", ("lora_alpha",), True, 4),
    ("repeated", "adapter_config.json", ("layer_replication",), [[0, 10**9]], 4),
    ("repeated", "adapter_config.json", ("layer_replication",), [[0, 2]] * 5000, 4),
    ("llama", "config.json", ("num_hidden_layers",), 10**9, 0),
    ("llama", "config.json", ("vocab_size",), 10**18, 0),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "file", "path", "value", "code"), FOUND, ids=lambda value: ascii(value)[:40])
def test_found(name: str, file: str, path: tuple[str, ...], value: object, code: int, tmp_path: Path) -> None:
    """code: how one of its steps ends."""
    subject = subjects.subject(tmp_path, name)
    outcome = wt.run(wt.Case(subject, file, path, "found", value), tmp_path / "case", merging=True)
    assert outcome.fault is None and code in outcome.codes


@pytest.mark.parametrize("strength", [STRONGEST, -STRONGEST, 1e-300, -0.0], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_bias", "dora", "pissa", "experts", "saved", "gptq_4b_g32_sym_v1"])
def test_the_largest_strengths_that_are_taken(name: str, strength: float, tmp_path: Path) -> None:
    """They end in a finite output, or in NumericError: what overflows is found in the weights."""
    subject = subjects.subject(tmp_path, name)
    config = json.loads(subject.file("adapter_config.json").read_text())
    (subject.path(subjects.ADAPTER) / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": STRONGEST}))
    for number, dtype in enumerate(("float32", "float16", "bfloat16")):
        out = tmp_path / f"out{number}"
        words = {"weight": strength, "dtype": dtype, "min_survival": 0, **subject.words}
        try:
            lora_merge.merge(subject.path(subjects.BASE), subject.path(subjects.ADAPTER), out, threads=1, **words)
            lora_merge.verify(out)
        except (NumericError, AdapterError) as error:
            assert not isinstance(error, AdapterError) or "weight" in str(error)
            assert not out.exists()


def test_the_keys_are_found_by_reading(tmp_path: Path) -> None:
    found = wt.keys(subjects.subject(tmp_path, "gptq_4b_g32_sym_v1"))
    for key in ("model_type", "tie_word_embeddings", "vocab_size", "quantization_bit", "auto_map"):
        assert ("config.json", (key,)) in found, key
    for key in (
        "bits",
        "group_size",
        "sym",
        "desc_act",
        "checkpoint_format",
        "dynamic",
        "modules_in_block_to_quantize",
    ):
        assert ("config.json", ("quantization_config", key)) in found, key
    assert ("config.json", ("quantization_config", "meta", "quantizer")) in found
    for key in ("lora_alpha", "layer_replication", "rank_pattern", "use_bdlora"):
        assert ("adapter_config.json", (key,)) in found, key


def test_look_ups_are_seen_in_copies_too(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": {"b": 1}, "c": [{"d": 2}]}')
    with recorded() as seen:
        body = opening.read_json(tmp_path / "x.json")  # type: ignore[attr-defined]  # watched where it is used
        (body | {"e": 1}).get("missing")
        ({"f": 1} | body["a"])["b"]
        body["c"][0].get("d")
    read = {(), ("missing",), ("a",), ("a", "b"), ("c",), ("c[]", "d")}
    assert {path for _, path in seen} == read - {()}
    assert opening.read_json is jsonfile.read_json  # type: ignore[attr-defined]


def test_a_crash_a_hang_and_a_bomb_are_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wt, "SECONDS", 0)
    monkeypatch.setattr(wt, "MEMORY", 50 * 2**20)

    def hang() -> None:
        while True:
            pass

    assert "ZeroDivisionError" in str(wt._step("crash", lambda: 1 / 0, "").fault)
    assert "TookTooLong" in str(wt._step("hang", hang, "").fault)
    monkeypatch.setattr(wt, "SECONDS", 5)
    assert "bytes" in str(wt._step("bomb", lambda: bytearray(b"x" * 2**27), "").fault)
    assert "MemoryError" in str(wt._step("bomb", lambda: bytearray(2**36), "").fault)
    assert wt._step("good", lambda: None, "").fault is None


def test_there_are_enough_cases(tmp_path: Path) -> None:
    found = [subjects.subject(tmp_path, name) for name in random.Random(SEED).sample(subjects.names(), 3)]
    counts = Counter({subject.name: len(list(wt.cases(subject))) for subject in found})
    assert min(counts.values()) > 1000
    case = next(wt.cases(found[0]))
    assert json.loads(case.text()) is not None
