"""The public functions on real files: values, determinism, errors, what is left behind."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.errors import (
    AdapterError,
    MemoryLimitError,
    NumericError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
    VerificationError,
)

Job = tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    base = small.write_base(tmp_path / "base")
    adapter = small.write_adapter(tmp_path / "adapter", base)
    return tmp_path, base, adapter


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    """At most 0.1 % of the elements differ, each by one step of their dtype or the float32 noise of the sum."""
    differs = ours != wanted
    assert differs.float().mean() <= 1e-3
    one, other = ours[differs], wanted[differs]
    kind = torch.int32 if ours.dtype == torch.float32 else torch.int16
    steps = (one.view(kind).int() - other.view(kind).int()).abs()
    noise = (one.float() - other.float()).abs() <= 1e-7 * wanted.float().abs().max()
    assert ((steps <= 1) | noise).all()


def test_a_merge_gives_the_sum_rounded_once_and_leaves_the_rest_alone(job: Job) -> None:
    path, base, adapter = job
    result = lora_merge.merge(path / "base", path / "adapter", path / "out")
    got, wanted = tensors(path / "out"), small.merged(base, adapter)
    assert sorted(got) == sorted(wanted)
    for name in wanted:
        if "_proj" in name:
            assert not torch.equal(got[name], base[name])
            close(got[name], wanted[name])
        else:
            assert torch.equal(got[name], base[name])
    assert len(result.weights) == 4 and result.copied == 4
    assert (path / "out/tokenizer.json").read_bytes() == (path / "base/tokenizer.json").read_bytes()
    assert (path / "out/config.json").read_bytes() == (path / "base/config.json").read_bytes()
    index = json.loads((path / "out/model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())
    assert sorted(index["weight_map"]) == sorted(wanted)
    assert not list(path.glob(".*partial*"))


def test_what_was_measured_is_what_happened(job: Job) -> None:
    path, base, _adapter = job
    result = lora_merge.merge(path / "base", path / "adapter", path / "out")
    got = tensors(path / "out")
    for weight in result.weights:
        delta = got[weight.name].float() - base[weight.name].float()
        whole = (delta.norm() / base[weight.name].float().norm()).item()
        assert weight.relative_change == pytest.approx(whole, rel=0.02)
        assert weight.changed == pytest.approx((delta != 0).float().mean().item(), abs=0.01)


@pytest.mark.parametrize(
    "words",
    [
        {"threads": 1},
        {"threads": 2},
        {"threads": 3, "max_memory": "ample"},
        {"max_memory": "least"},
        {"threads": 2, "max_memory": "least"},
    ],
    ids=str,
)
def test_the_same_bytes_whatever_the_machine(job: Job, words: dict[str, Any]) -> None:
    path = job[0]
    lora_merge.merge(path / "base", path / "adapter", path / "one", threads=2)
    if "max_memory" in words:  # beyond what this process holds, which earlier tests may have made large
        more = {"least": 4_000_000, "ample": 800_000_000}[words["max_memory"]]
        words = words | {"max_memory": lora_merge.plan(path / "base", path / "adapter").memory + more}
    lora_merge.merge(path / "base", path / "adapter", path / "two", **words)
    assert contents(path / "one") == contents(path / "two")


@pytest.mark.parametrize(("threads", "after"), [(1, 1), (1, 2), (2, 1)])
def test_a_resume_in_the_middle_gives_the_same_bytes(job: Job, threads: int, after: int) -> None:
    path = job[0]
    lora_merge.merge(path / "base", path / "adapter", path / "calm")

    def stop(name: str, nbytes: int, total: int) -> None:
        if len(list(path.glob(".out.partial/files/*.safetensors"))) >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(path / "base", path / "adapter", path / "out", threads=threads, progress=stop)
    assert not (path / "out").exists()
    with pytest.raises(OutputExistsError, match="--resume"):
        lora_merge.merge(path / "base", path / "adapter", path / "out")
    resumed = lora_merge.merge(path / "base", path / "adapter", path / "out", threads=3 - threads, resume=True)
    assert 1 <= resumed.resumed <= 2
    assert contents(path / "out") == contents(path / "calm")


def test_a_stage_of_another_job_is_not_resumed(job: Job) -> None:
    path = job[0]

    def stop(name: str, nbytes: int, total: int) -> None:
        if list(path.glob(".out.partial/files/*.safetensors")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(path / "base", path / "adapter", path / "out", threads=1, progress=stop)
    with pytest.raises(OutputExistsError, match="--restart"):
        lora_merge.merge(path / "base", path / "adapter", path / "out", resume=True, weight=0.5)
    lora_merge.merge(path / "base", path / "adapter", path / "out", restart=True, weight=0.5)
    lora_merge.merge(path / "base", path / "adapter", path / "calm", weight=0.5)
    assert contents(path / "out") == contents(path / "calm")


def test_blocks_of_any_number_of_tiles_give_the_same_bytes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_merge.execution import memory as machine

    path = job[0]
    seen = []
    for tiles in (1, 2, 3, 7):
        monkeypatch.setattr(machine, "BLOCK_TILES", tiles)
        lora_merge.merge(path / "base", path / "adapter", path / f"out{tiles}")
        seen.append(contents(path / f"out{tiles}"))
    assert all(other == seen[0] for other in seen[1:])


def test_less_memory_than_the_least_is_refused_before_anything_is_written(job: Job) -> None:
    path = job[0]
    with pytest.raises(MemoryLimitError, match="needs at least"):
        lora_merge.merge(path / "base", path / "adapter", path / "out", max_memory="50MB")
    assert not (path / "out").exists() and not list(path.glob(".*partial*"))


def test_a_plan_writes_nothing_and_tells_sizes(job: Job) -> None:
    path = job[0]
    plan = lora_merge.plan(path / "base", path / "adapter", path / "out")
    assert sorted(os.listdir(path)) == ["adapter", "base"]
    assert plan.merged == 4 and len(plan.weights) == 8 and len(plan.shards) == 3
    lora_merge.merge(path / "base", path / "adapter", path / "out")
    for file, nbytes in plan.shards.items():
        assert (path / "out" / file).stat().st_size == nbytes
    of_results = "lora_merge.json", "README.md"
    written = sum(f.stat().st_size for f in (path / "out").iterdir() if f.name not in of_results)
    assert plan.disk == written


def test_two_adapters_add_in_float32_and_round_once(job: Job) -> None:
    path, base, first = job
    second = small.write_adapter(path / "second", base, seed=11)
    lora_merge.merge(path / "base", [path / "adapter", path / "second"], path / "out", weight=[0.7, 0.3])
    got = tensors(path / "out")
    name = "model.layers.0.up_proj.weight"
    key = "base_model.model.model.layers.0.up_proj"
    delta = sum(
        w * 2.0 * (a[f"{key}.lora_B.weight"] @ a[f"{key}.lora_A.weight"]) for w, a in ((0.7, first), (0.3, second))
    )
    close(got[name], (base[name].float() + delta).to(base[name].dtype))


def test_no_adapter_is_a_conversion(job: Job) -> None:
    path, base, _ = job
    lora_merge.merge(path / "base", [], path / "out", dtype="float16")
    assert {name: value.dtype for name, value in tensors(path / "out").items()} == dict.fromkeys(base, torch.float16)
    for name, value in tensors(path / "out").items():
        assert torch.equal(value, base[name].to(torch.float16))
    assert json.loads((path / "out/config.json").read_bytes())["torch_dtype"] == "float16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_plain_dtypes_in_and_out(tmp_path: Path, dtype: torch.dtype) -> None:
    base = small.write_base(tmp_path / "base", shards=1, dtype=dtype, layers=1)
    adapter = small.write_adapter(tmp_path / "adapter", base)
    lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.up_proj.weight"
    wanted = small.merged({name: base[name].float()}, adapter)[name]
    assert got[name].dtype == (torch.float32 if dtype == torch.float64 else dtype)
    if dtype == torch.float32:
        assert (got[name] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    elif dtype != torch.float64:
        close(got[name], wanted.to(dtype))


def test_overflow_of_float16_names_the_tensor(tmp_path: Path) -> None:
    base = small.write_base(tmp_path / "base", shards=1, dtype=torch.float16, layers=1)
    base["model.layers.0.down_proj.weight"][3] = 65000
    save_file(base, tmp_path / "base/model.safetensors")
    small.write_adapter(tmp_path / "adapter", base, scale=200.0)
    with pytest.raises(NumericError, match=r"model\.layers\.0\.down_proj\.weight.*overflow F16.*--dtype"):
        lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16", restart=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_values_that_are_not_finite_are_found(tmp_path: Path, value: float, where: str) -> None:
    base = small.write_base(tmp_path / "base", shards=1, layers=1)
    adapter = small.write_adapter(tmp_path / "adapter", base)
    if where == "base":
        base["model.layers.0.down_proj.weight"][1000, 7] = value
        save_file(base, tmp_path / "base/model.safetensors")
    else:
        adapter["base_model.model.model.layers.0.down_proj.lora_B.weight"][1000, 7] = value
        save_file(adapter, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(NumericError, match=r"down_proj\.weight.*not finite.*row 1000"):
        lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_float8_that_nobody_touches_passes_as_bytes(tmp_path: Path) -> None:
    base = small.write_base(tmp_path / "base", shards=1, layers=1)
    adapter = small.write_adapter(tmp_path / "adapter", base)
    base["extra.weight"] = torch.randn(16, 16).to(torch.float8_e4m3fn)
    save_file(base, tmp_path / "base/model.safetensors")
    lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float32")
    got = load_file(tmp_path / "out/model.safetensors")["extra.weight"]
    assert got.dtype == torch.float8_e4m3fn and torch.equal(
        got.view(torch.uint8), base["extra.weight"].view(torch.uint8)
    )
    adapter["base_model.model.extra.lora_A.weight"] = torch.randn(small.RANK, 16)
    adapter["base_model.model.extra.lora_B.weight"] = torch.randn(16, small.RANK)
    save_file(adapter, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=r"extra\.weight \(F8_E4M3"):
        lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "two")


@pytest.mark.parametrize("stray", ["all", "one"])
def test_an_adapter_that_does_not_fit_is_refused_and_named(job: Job, stray: str) -> None:
    path, _base, adapter = job
    moved = {}
    for name, value in adapter.items():
        wrong = stray == "all" or "layers.1.down_proj" in name
        moved[name.replace("model.layers.", "model.layers.9", 1) if wrong else name] = value
    save_file(moved, path / "adapter/adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        lora_merge.merge(path / "base", path / "adapter", path / "out")
    named = [n for n in ("up_proj", "down_proj") if n in str(caught.value)]
    assert "layers.91.down_proj.weight" in str(caught.value) and (stray == "one" or named == ["up_proj", "down_proj"])
    assert sorted(os.listdir(path)) == ["adapter", "base"]


def test_a_tensor_may_be_left_unused_on_purpose(job: Job) -> None:
    path, base, adapter = job
    extra = {"base_model.model.model.layers.7.up_proj.lora_A.weight": torch.randn(small.RANK, small.NARROW)}
    extra["base_model.model.model.layers.7.up_proj.lora_B.weight"] = torch.randn(small.WIDE, small.RANK)
    save_file(adapter | extra, path / "adapter/adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.7"):
        lora_merge.merge(path / "base", path / "adapter", path / "out")
    lora_merge.merge(path / "base", path / "adapter", path / "out", allow_unused=r"layers\.7\.")
    assert sorted(tensors(path / "out")) == sorted(base)


def test_max_shard_size_cuts_and_names_shards(job: Job) -> None:
    path, base, _ = job
    lora_merge.merge(path / "base", path / "adapter", path / "out", max_shard_size="4MB")
    files = sorted(file.name for file in (path / "out").glob("*.safetensors"))
    assert len(files) > 3 and all(f"-of-{len(files):05d}" in file for file in files)
    assert sorted(tensors(path / "out")) == sorted(base)


def test_verify_proves_and_disproves(job: Job) -> None:
    path = job[0]
    lora_merge.merge(path / "base", path / "adapter", path / "out", verify=True)
    lora_merge.verify(path / "out")
    lora_merge.verify(path / "out", base=path / "base", adapters=[path / "adapter"])
    small.write_adapter(path / "other", small.merged({}, {}) or job[1], seed=12)
    with pytest.raises(VerificationError, match="not what this base and these adapters give"):
        lora_merge.verify(path / "out", base=path / "base", adapters=[path / "other"])
    shard = path / "out/model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match=shard.name):
        lora_merge.verify(path / "out")


def test_verify_asks_for_the_adapters_of_the_merge(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    path, base, _ = job
    small.write_adapter(path / "other", base, seed=12)
    both = [path / "adapter", path / "other"]
    lora_merge.merge(path / "base", both, path / "two", weight=(0.5, 1))
    lora_merge.merge(path / "base", [], path / "none", dtype="float16")
    assert lora_merge.verify(path / "two", base=path / "base", adapters=both).recomputed
    assert lora_merge.verify(path / "none", base=path / "base").recomputed
    monkeypatch.setattr("lora_merge.api.verify_output", lambda *words: pytest.fail("everything was read first"))
    wrong: list[Any] = [[], path / "adapter", [*both, path / "other"]]
    for adapters in wrong:
        with pytest.raises(UsageError, match=r"merged with 2 adapters, .* --adapter, in this order: adapter, other"):
            lora_merge.verify(path / "two", base=path / "base", adapters=adapters)
    with pytest.raises(UsageError, match="merged with 0 adapters, and 1 are given; leave --adapter out"):
        lora_merge.verify(path / "none", base=path / "base", adapters=[path / "adapter"])
    with pytest.raises(UsageError, match="give --base too"):
        lora_merge.verify(path / "two", adapters=both)


def test_an_output_that_exists_is_kept_unless_told_otherwise(job: Job) -> None:
    path = job[0]
    lora_merge.merge(path / "base", path / "adapter", path / "out")
    before = contents(path / "out")
    with pytest.raises(OutputExistsError):
        lora_merge.merge(path / "base", path / "adapter", path / "out")
    lora_merge.merge(path / "base", path / "adapter", path / "out", overwrite=True)
    assert contents(path / "out") == before


def test_words_that_are_none_are_usage_errors(job: Job) -> None:
    path = job[0]
    with pytest.raises(UsageError, match="colour"):
        lora_merge.merge(path / "base", path / "adapter", path / "out", colour="red")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="2 given for 1"):
        lora_merge.merge(path / "base", path / "adapter", path / "out", weight=[1, 2])
    with pytest.raises(UsageError, match="not a size"):
        lora_merge.merge(path / "base", path / "adapter", path / "out", max_memory="lots")


class Told:
    """A progress that remembers what it was told. stop: raise KeyboardInterrupt after so many calls."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.stop = stop

    def __call__(self, name: str, work: int, total: int, /) -> None:
        self.calls.append((work, total))
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt

    def check(self) -> None:
        """All that was told adds up to the one total."""
        totals = {total for _, total in self.calls}
        assert totals == {sum(work for work, _ in self.calls)} and min(work for work, _ in self.calls) >= 0


def test_progress_adds_up_to_the_total_and_nothing_is_printed(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    path = job[0]
    base, adapter, out = (path / name for name in ("base", "adapter", "out"))
    runs: list[dict[str, Any]] = [{}, {"verify": True}, {"bits": 4}, {"bits": 8, "format": "fp8", "verify": True}]
    for words in runs:
        told = Told()
        lora_merge.merge(base, adapter, out, progress=told, **words)
        told.check()
        for inputs in ({}, {"base": base, "adapters": adapter}):
            told = Told()
            lora_merge.verify(out, progress=told, **inputs)
            told.check()
        shutil.rmtree(out)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("words", [{}, {"bits": 4, "verify": True}], ids=str)
@pytest.mark.parametrize("calls", [2, 4, 7])
def test_progress_of_a_resumed_merge_adds_up_to_what_is_left(
    job: Job, calls: int, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job[0]
    inputs = path / "base", path / "adapter", path / "out"
    monkeypatch.setattr("lora_merge.execution.blocks.COPIED", 100_000)
    monkeypatch.setattr("lora_merge.output.shard.SPAN", 1)
    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(*inputs, progress=Told(calls), threads=1, **words)
    whole, rest = Told(), Told()
    lora_merge.merge(*inputs, progress=rest, threads=1, resume=True, **words)
    rest.check()
    lora_merge.merge(*inputs[:2], path / "calm", progress=whole, threads=1, **words)
    whole.check()
    assert rest.calls[0][1] < whole.calls[0][1]


def test_inspect_tells_what_is_there(job: Job) -> None:
    path = job[0]
    found = lora_merge.inspect(path / "base")
    assert (found.role, found.kind, len(found.tensors)) == ("checkpoint", "plain", 8)
    assert lora_merge.inspect(path / "adapter").kind == "LORA"


def test_public_names_are_all_there() -> None:
    code = (
        "import lora_merge as m, sys; assert 'torch' not in sys.modules; "
        "print(all(getattr(m, name) for name in m.__all__), callable(m.plan), callable(m.verify))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True True True\n"


def test_a_resume_of_what_is_finished_finds_it_finished(job: Job) -> None:
    path = job[0]
    lora_merge.merge(path / "base", path / "adapter", path / "out")
    before = contents(path / "out")
    again = lora_merge.merge(path / "base", path / "adapter", path / "out", resume=True)
    assert again.resumed == 3 and len(again.weights) == 4 and contents(path / "out") == before
    with pytest.raises(OutputExistsError):
        lora_merge.merge(path / "base", path / "adapter", path / "out", resume=True, weight=0.5)
    (path / "out/tokenizer.json").write_bytes(b"{}")
    with pytest.raises(VerificationError, match=r"tokenizer\.json"):
        lora_merge.merge(path / "base", path / "adapter", path / "out", resume=True)


def test_a_loralib_file_beside_the_output(job: Job) -> None:
    path, base, _ = job
    name = "model.layers.1.up_proj"
    factors = {f"{name}.lora_a": torch.randn(4, small.NARROW), f"{name}.lora_b": torch.randn(small.WIDE, 4) * 0.02}
    torch.save({key: value.half() for key, value in factors.items()}, path / "lora.pt")
    assert lora_merge.inspect(path / "lora.pt").role == "adapter"
    with pytest.raises(UsageError, match="--alpha"):
        lora_merge.merge(path / "base", path / "lora.pt", path / "out")
    lora_merge.merge(path / "base", path / "lora.pt", path / "out", alpha=32)
    delta = 8 * factors[f"{name}.lora_b"].half().float() @ factors[f"{name}.lora_a"].half().float()
    close(tensors(path / "out")[f"{name}.weight"], (base[f"{name}.weight"].float() + delta).to(torch.bfloat16))


def test_saved_counters_that_are_no_floats_are_replaced(tmp_path: Path) -> None:
    base = small.write_base(tmp_path / "base", shards=1, layers=1)
    save_file(base | {"norm.num_batches_tracked": torch.tensor(3)}, tmp_path / "base/model.safetensors")
    saved = {"base_model.model.norm.num_batches_tracked": torch.tensor(11)}
    small.save_adapter(tmp_path / "adapter", saved, modules_to_save=["norm"])
    lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["norm.num_batches_tracked"].item() == 11


def test_factors_that_several_weights_share_are_read_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_merge.execution.factors import FactorReader
    from lora_merge.execution.tiles import CACHED

    class Counted:
        loads = 0

        def load(self, name: str) -> torch.Tensor:
            Counted.loads += 1
            return torch.ones(2)

    checkpoint = cast(Checkpoint, Counted())
    reader = FactorReader(checkpoint, torch.device("cpu"), {"shared": 3, "alone": 1})
    for name in ("shared", "alone", "shared", "shared"):
        assert reader(name).sum() == 2
    assert Counted.loads == 2 and not reader.cached
    many = FactorReader(checkpoint, torch.device("cpu"), {str(n): 2 for n in range(20)})
    for n in range(20):
        many(str(n))
    assert len(many.cached) == CACHED


def test_half_a_new_vocabulary_is_refused(job: Job) -> None:
    path = job[0]
    name = "base_model.model.model.embed_tokens.weight"
    small.save_adapter(path / "half", {name: torch.randn(310, small.NARROW)})
    with pytest.raises(
        AdapterError, match=r"only a part of the vocabulary.*embed_tokens.weight 310.*lm_head.weight 300"
    ):
        lora_merge.merge(path / "base", path / "half", path / "out")
    both = {name: torch.randn(310, small.NARROW), "base_model.model.lm_head.weight": torch.randn(310, small.NARROW)}
    small.save_adapter(path / "both", both)
    lora_merge.merge(path / "base", path / "both", path / "out")
    assert tensors(path / "out")["lm_head.weight"].shape == (310, small.NARROW)
    assert json.loads((path / "out/config.json").read_bytes())["vocab_size"] == 310


def test_sixteen_bits_of_a_wider_base_need_a_dtype(tmp_path: Path) -> None:
    base = small.write_base(tmp_path / "base", shards=1, dtype=torch.float32, layers=1)
    small.write_adapter(tmp_path / "adapter", base)
    with pytest.raises(UsageError, match="--dtype bfloat16 or --dtype float16"):
        lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", bits=16)
    with pytest.raises(UsageError, match="exclude each other"):
        lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", bits=16, dtype="float32")
    with pytest.raises(UsageError, match="not one of 1, 2, 3, 4"):
        lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", bits=9)  # type: ignore[arg-type]
    lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", bits=16, dtype="float16")
    assert tensors(tmp_path / "out")["lm_head.weight"].dtype == torch.float16


def test_a_classifier_with_other_labels_is_no_vocabulary(job: Job) -> None:
    path, base, _ = job
    shutil.rmtree(path / "base")
    small.write_base(path / "base", shards=1)
    save_file(base | {"score.weight": torch.ones(2, small.NARROW)}, path / "base/model.safetensors")
    (path / "base/config.json").write_text(json.dumps({"model_type": "made_up", "vocab_size": 300}))
    saved = {"base_model.model.score.weight": torch.ones(5, small.NARROW)}
    small.save_adapter(path / "labels", saved, modules_to_save=["score"])
    result = lora_merge.merge(path / "base", path / "labels", path / "out")
    assert tensors(path / "out")["score.weight"].shape == (5, small.NARROW)
    assert json.loads((path / "out/config.json").read_bytes())["vocab_size"] == 300
    assert any("labels" in note for note in result.notes)


def test_the_record_names_adapters_by_their_digest(job: Job) -> None:
    path = job[0]
    lora_merge.merge(path / "base", path / "adapter", path / "out")
    inputs = json.loads((path / "out/lora_merge.json").read_bytes())["inputs"]
    data = (path / "adapter/adapter_model.safetensors").read_bytes()
    assert inputs[1]["files"]["adapter_model.safetensors"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_the_module_lists_its_public_names_and_loads_nothing_for_it() -> None:
    code = "import sys, lora_merge as m; print(dir(m) == sorted(m.__all__), 'lora_merge.public' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
