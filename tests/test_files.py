"""Files of class sets: complete or not there, and refused when they are something else."""

from __future__ import annotations

import importlib
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from cudfast import ClassSets

from .test_sets import lists, members, relaxed


@relaxed
@given(rows=lists())
def test_saved_and_loaded(rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("safetensors")
    sets = ClassSets.from_lists(rows)
    path = tmp_path_factory.mktemp("sets") / "near.safetensors"
    sets.save(path)
    assert members(ClassSets.load(str(path))) == members(sets)
    assert os.listdir(path.parent) == [path.name]


def test_saving_replaces_and_leaves_the_mode_to_the_user(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "other").touch()
    path = tmp_path / "near"
    ClassSets.from_groups([0, 0]).save(path)
    old = ClassSets.load(path)
    ClassSets.from_groups([0, 1, 2]).save(path)
    assert members(old) == [[0, 1], [0, 1]]
    assert members(ClassSets.load(path)) == [[0], [1], [2]]
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "near"
    ClassSets.from_groups([0, 0]).save(path)

    def fail(content: object, target: Path, metadata: object) -> None:
        target.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(numpy, "save_file", fail)
        with pytest.raises(OSError, match="No space left on device"):
            ClassSets.from_groups([0, 1]).save(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = ClassSets.from_groups(torch.arange(10_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))  # the kernel refuses the rest of the file
    try:
        with pytest.raises(Exception, match="File too large"):
            large.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(FileNotFoundError):
        large.save(tmp_path / "absent" / "near")
    assert os.listdir(tmp_path) == ["near"]
    assert members(ClassSets.load(path)) == [[0, 1], [0, 1]]


def test_files_that_are_refused(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    path = tmp_path / "near"
    ClassSets.from_groups([0, 0]).save(path)
    whole = path.read_bytes()
    metadata = {"format": "cudfast.ClassSets", "version": "1"}
    for broken in (b"", b"not this at all", whole[:40], whole[:-3]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"near is not a file that cudfast.ClassSets.save wrote: "):
            ClassSets.load(path)

    def refused(message: str, content: dict[str, np.ndarray], metadata: dict[str, str] | None) -> None:
        save_file(content, path, metadata)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            ClassSets.load(path)
        assert str(caught.value) == f"{path} is not a file that cudfast.ClassSets.save wrote: {message}"

    good = {"offsets": np.array([0, 1]), "indices": np.array([0])}
    expected = f"expected the metadata {metadata}, got "
    refused(expected + "{'format': None, 'version': None}", good, None)
    refused(expected + "{'format': 'cudfast.ClassSets', 'version': '2'}", good, {**metadata, "version": "2"})
    refused(
        "offsets runs from 0 to 2: expected 0 to 1, the length of indices",
        good | {"offsets": np.array([0, 2])},
        metadata,
    )
    refused("File does not contain tensor indices", {"offsets": good["offsets"]}, metadata)
    with pytest.raises(FileNotFoundError, match="absent"):
        ClassSets.load(tmp_path / "absent")


def test_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    for call in (lambda: ClassSets.from_groups([0]).save("x"), lambda: ClassSets.load("x")):
        with pytest.raises(ImportError) as caught:
            call()
        assert str(caught.value) == "saving and loading need safetensors: pip install cudfast[safetensors]"
