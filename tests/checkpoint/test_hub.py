"""Models of the hub in the local cache; huggingface_hub itself is the judge of where they lie."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache

import lora_merge
from lora_merge import cli
from lora_merge.checkpoint.hub import HubId, located
from lora_merge.errors import InputError, OutputExistsError

FIRST, SECOND = "a" * 40, "b" * 40
OFFLINE = """
import socket, sys
def refuse(*address): raise AssertionError(f"a connection is opened: {address}")
socket.socket.connect = socket.getaddrinfo = refuse
from lora_merge import cli
sys.exit(cli.run(sys.argv[1:]))
"""


def store(cache: Path, repo: str, folder: Path, commit: str = FIRST, *refs: str) -> Path:
    """A folder put into a cache as the hub's own client lays it out; the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for file in sorted(folder.iterdir()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with org/base and org/lora, whose folders lie in the current one as well."""
    base = small.write_base(tmp_path / "base")
    small.write_adapter(tmp_path / "adapter", base)
    home = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.chdir(tmp_path)
    store(home, "org/base", tmp_path / "base", FIRST, "main", "v1", "refs/pr/3")
    store(home, "org/lora", tmp_path / "adapter", SECOND, "main")
    return home


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("org/name", HubId("org/name")),
        ("org/na.me-1_x@v1.0", HubId("org/na.me-1_x", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("gpt2", HubId("gpt2")),
        ("https:/huggingface.co/org/name", HubId("org/name")),
        ("hf:/org/name", HubId("org/name")),
        *((text, None) for text in ("a/b/c", "../name", "org/", "/org/name", "org/name@", "org/name@../../x", ".")),
        *((text, None) for text in ("org/lora.safetensors", "org--x/name", "org/n ame", "org/name@a@b", "", "x" * 97)),
    ],
)
def test_what_is_an_id(text: str, wanted: HubId | None) -> None:
    assert HubId.parse(text) == wanted


@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/3", FIRST])
def test_a_cached_model_lies_where_the_hubs_own_client_finds_it(cache: Path, revision: str | None) -> None:
    found = located(Path("org/base" + (f"@{revision}" if revision else "")))
    judge = try_to_load_from_cache("org/base", "config.json", cache_dir=cache, revision=revision)
    assert str(found / "config.json") == judge
    snapshots = {one.snapshot_path for repo in scan_cache_dir(cache).repos for one in repo.revisions}
    assert found in snapshots and HubId.of_snapshot(found) == HubId("org/base", FIRST)


def test_a_merge_from_the_cache_gives_the_bytes_of_one_from_folders(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_merge.merge("base", "adapter", "wanted")
    assert cli.run(["org/base@v1", "org/lora", "out"]) == 0
    said = capsys.readouterr().out
    assert f"note: org/base@v1: is read from the hub's cache, {cache}/models--org--base/snapshots/{FIRST}" in said
    names = sorted(os.listdir("wanted"))
    assert names == sorted(os.listdir("out"))
    assert "base_model:\n- org/base\n- org/lora\n" in Path("out", "README.md").read_text()
    for name in set(names) - {"lora_merge.json", "README.md"}:
        assert Path("out", name).read_bytes() == Path("wanted", name).read_bytes(), name
        assert not Path("out", name).is_symlink()
    inputs = json.loads(Path("out", "lora_merge.json").read_text())["inputs"]
    assert [one["name"] for one in inputs] == [f"org/base@{FIRST}", f"org/lora@{SECOND}"]
    assert cli.run(["verify", "out", "--base", "org/base", "--adapter", "org/lora"]) == 0
    assert lora_merge.inspect("org/base").role == "checkpoint" and lora_merge.inspect("org/lora").role == "adapter"
    assert any("hub's cache" in note for note in lora_merge.plan("org/base", "org/lora").notes)


def test_a_run_that_was_stopped_goes_on(cache: Path) -> None:
    def stop(name: str, nbytes: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge("org/base", "org/lora", "out", progress=stop)
    assert lora_merge.merge("org/base", "org/lora", "out", resume=True).notes
    lora_merge.verify("out", base="base", adapters="adapter")


def test_a_folder_of_that_name_wins(cache: Path) -> None:
    Path("org").mkdir()
    small.write_base(Path("org/base"))
    assert located(Path("org/base")) == Path("org/base")
    assert located(Path("base")) == Path("base") and located(Path("missing")) == Path("missing")


def test_a_single_file_of_a_snapshot_is_a_path(cache: Path) -> None:
    store(cache, "gpt2", Path("adapter"), FIRST, "main")
    file = located(Path("gpt2")) / "adapter_model.safetensors"
    assert located(Path("gpt2")) != Path("gpt2") and located(file) == file


def test_the_root_of_a_model_in_a_cache_is_its_main_or_only_snapshot(cache: Path) -> None:
    root = cache / "models--org--base"
    assert located(root) == root / "snapshots" / FIRST
    store(cache, "org/base", Path("adapter"), SECOND)
    assert located(root) == root / "snapshots" / FIRST
    os.chdir(root)
    assert located(Path(".")).resolve() == root / "snapshots" / FIRST
    shutil.rmtree(root / "refs")
    with pytest.raises(InputError, match=rf"2 snapshots.*org/base@{FIRST}, org/base@{SECOND}: name one.*hf download"):
        located(root)
    assert located(Path(f"org/base@{SECOND}")) == root / "snapshots" / SECOND
    shutil.rmtree(root / "snapshots" / FIRST)
    assert located(Path("org/base")) == root / "snapshots" / SECOND
    shutil.rmtree(root / "snapshots" / SECOND)
    with pytest.raises(InputError, match="holds no snapshot; fetch it with `hf download org/base`"):
        located(root)


@pytest.mark.parametrize("text", [SECOND, "../../../../base", "x\n" * 200, "\xff"])
def test_a_ref_that_leads_to_no_snapshot(cache: Path, text: str) -> None:
    store(cache, "org/base", Path("adapter"), "c" * 40)
    (cache / "models--org--base/refs/main").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="hf download org/base`"):
        located(Path("org/base"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["org/other", "adapter", "out"], "fetch it with `hf download org/other`"),
        (["base", "org/other@v2", "out"], "fetch it with `hf download org/other --revision v2`"),
        (["base", "adapter", "out", "--adapter-base", "org/other"], "`hf download org/other`"),
        (["org/base@v2", "adapter", "out"], f"has no revision v2; there are org/base@{FIRST}: name one of them, or"),
        (["inspect", "org/other"], "no such model in the hub's cache at"),
        (["verify", "out", "--base", "org/other", "--adapter", "adapter"], "`hf download org/other`"),
    ],
)
def test_what_is_not_in_the_cache_is_told_with_the_way_to_fetch_it(
    cache: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    if words[0] == "verify":
        lora_merge.merge("base", "adapter", "out")
    assert cli.run(words) == 3
    assert says in capsys.readouterr().err


def test_a_snapshot_that_lacks_files_says_which_and_how_to_fetch_them(cache: Path) -> None:
    snapshot = located(Path("org/base"))
    shard = sorted(snapshot.glob("*.safetensors"))[1]
    fetched = f"hf download org/base --revision {FIRST}"
    blob = shard.resolve()
    blob.rename(f"{blob}.incomplete")
    with pytest.raises(InputError, match=rf"{shard.name}.*does not exist; the download is probably incomplete"):
        lora_merge.merge("org/base", "adapter", "out")
    shard.unlink()
    with pytest.raises(InputError, match=rf"1 of 3 shards are missing \({shard.name}\).*fetch them with `{fetched}`"):
        lora_merge.merge("org/base", "adapter", "out")
    for file in snapshot.glob("model*"):
        file.unlink()
    with pytest.raises(InputError, match=rf"holds no weights.*`{fetched}`"):
        lora_merge.merge("org/base", "adapter", "out")


def test_a_cache_is_never_written_into(cache: Path) -> None:
    root = cache / "models--org--base"
    for out in (root / "snapshots" / FIRST, root / "snapshots" / FIRST / "merged", root, root / "blobs"):
        with pytest.raises(OutputExistsError):
            lora_merge.merge("org/base", "org/lora", out)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_cache_is_where_the_environment_says_and_no_connection_is_opened(cache: Path, variable: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    place = cache if variable == "HF_HUB_CACHE" else cache.parent
    command = [sys.executable, "-c", OFFLINE, "org/base", "org/lora"]
    for words, code in ((["out"], 0), (["out2", "--adapter-base", "org/other"], 3)):
        done = subprocess.run([*command, *words], env=clean | {variable: str(place)}, capture_output=True, text=True)
        assert done.returncode == code and "connection" not in done.stderr, done.stderr
