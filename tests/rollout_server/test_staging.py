"""Staged weights are whole and checked, or refused; nothing is left lying about."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from protocol.errors import InvalidError, UnavailableError
from protocol.messages import TensorSpec, Version
from rollout_server.safetensors_file import read_folder
from rollout_server.weights import ModelShape, Ranges, Staging, check_folder
from tests.rollout_server.serving import tensors_of
from tests.tiny_model import make_tiny_model

V = Version(1, 3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", layers=1, hidden=16, heads=2)


def staging(tmp_path: Path, budget: int = 1 << 30) -> Staging:
    return Staging("run-r0", [tmp_path / "staging"], budget)


def as_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def test_chunks_in_any_order_make_the_same_file(tmp_path: Path, model: Path) -> None:
    manifest, data = tensors_of(model)
    transfer = staging(tmp_path).begin(V, manifest, len(data))
    for offset in sorted(range(0, len(data), 777), key=lambda at: at * 31 % 101):
        transfer.write(offset, as_bytes(data[offset : offset + 777]))
        transfer.write(offset, as_bytes(data[offset : offset + 777]))
    transfer.check()
    ours, theirs = load_file(transfer.folder / "model.safetensors"), load_file(model / "model.safetensors")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    transfer.discard()
    assert not transfer.folder.exists()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12))
def test_ranges_know_which_bytes_arrived(chunks: list[tuple[int, int]]) -> None:
    ranges, bytes_there = Ranges(), set[int]()
    for start, size in chunks:
        ranges.add(start, start + size)
        bytes_there |= set(range(start, start + size))
    for size in (0, 1, 20, 80):
        assert ranges.covers(size) == (bytes_there == set(range(size)) or size == 0)
    assert ranges.first_gap() == next(i for i in range(100) if i not in bytes_there)


def test_missing_damaged_and_foreign_bytes_are_refused(tmp_path: Path, model: Path) -> None:
    manifest, data = tensors_of(model)
    transfer = staging(tmp_path).begin(V, manifest, len(data))
    transfer.write(0, as_bytes(data[:-1]))
    with pytest.raises(InvalidError, match=f"incomplete from byte {len(data) - 1}"):
        transfer.check()
    transfer.write(len(data) - 1, as_bytes(bytes([data[-1] ^ 1])))
    with pytest.raises(InvalidError, match=rf"tensor {manifest[-1].name}: checksum"):
        transfer.check()
    with pytest.raises(InvalidError, match="beyond"):
        transfer.write(len(data), as_bytes(b"x"))
    with pytest.raises(InvalidError, match="uint8"):
        transfer.write(0, np.zeros(3, np.float32))
    transfer.write(len(data) - 1, as_bytes(data[-1:]))
    transfer.check()
    transfer.discard()


def test_sizes_are_settled_at_begin(tmp_path: Path, model: Path) -> None:
    manifest, data = tensors_of(model)
    with pytest.raises(InvalidError, match="differs"):
        staging(tmp_path).begin(V, manifest, len(data) + 1)
    with pytest.raises(InvalidError, match="staging_budget_bytes"):
        staging(tmp_path, budget=len(data) - 1).begin(V, manifest, len(data))
    with pytest.raises(InvalidError, match="twice"):
        staging(tmp_path).begin(V, [*manifest, *manifest], 2 * len(data))
    with pytest.raises(InvalidError, match="unknown dtype"):
        staging(tmp_path).begin(V, [TensorSpec(name="a", dtype="complex7", shape=[1], crc32=0)], 1)
    huge = TensorSpec(name="a", dtype="uint8", shape=[1 << 60], crc32=0)
    with pytest.raises(UnavailableError, match="no room"):
        staging(tmp_path, budget=1 << 62).begin(V, [huge], 1 << 60)


def test_what_a_killed_server_left_is_reclaimed(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    parent = tmp_path / "staging"
    left, mine, other = (
        parent / f"igrpo-{n}" for n in (f"run-r0-{dead.stdout.strip()}", f"run-r0-{os.getpid()}", "x-1")
    )
    for folder in (left, mine, other):
        folder.mkdir(parents=True)
    staging(tmp_path)
    assert (left.exists(), mine.exists(), other.exists()) == (False, True, True)


def test_an_update_must_be_the_whole_model(tmp_path: Path, model: Path) -> None:
    manifest, _ = tensors_of(model)
    shape = ModelShape.of_folder(model, tied=True)
    shape.check_manifest(manifest)
    head = TensorSpec(name="lm_head.weight", dtype="float32", shape=[320, 16], crc32=0)
    shape.check_manifest([*manifest, head])  # tied: it may come along
    with pytest.raises(InvalidError, match="lm_head"):
        ModelShape.of_folder(model, tied=False).check_manifest([*manifest, head])
    with pytest.raises(InvalidError, match=f"{manifest[0].name} of the model is missing"):
        shape.check_manifest(manifest[1:])
    with pytest.raises(InvalidError, match="does not belong"):
        shape.check_manifest([*manifest, TensorSpec(name="zzz", dtype="float32", shape=[1], crc32=0)])
    wider = make_tiny_model(tmp_path / "wider", layers=1, hidden=32, heads=2)
    with pytest.raises(InvalidError, match="has shape"):
        check_folder(wider, None, shape)


def test_a_folder_is_checked_against_its_manifest(tmp_path: Path, model: Path) -> None:
    manifest, _ = tensors_of(model)
    shape = ModelShape.of_folder(model, tied=True)
    check_folder(model, manifest, shape)
    other = make_tiny_model(tmp_path / "other", seed=5, layers=1, hidden=16, heads=2)
    with pytest.raises(InvalidError, match="checksum"):
        check_folder(other, manifest, shape)
    with pytest.raises(InvalidError, match=r"no \*\.safetensors"):
        check_folder(tmp_path / "nowhere", None, shape)
    for damage in (b"", b"\xff" * 64, (10**6).to_bytes(8, "little") + b"{}"):
        (other / "model.safetensors").write_bytes(damage)
        with pytest.raises(InvalidError, match="damaged header"):
            check_folder(other, None, shape)


def test_sharded_and_bfloat16_folders_are_read(tmp_path: Path) -> None:
    half = make_tiny_model(tmp_path / "half", dtype="bfloat16", layers=1)
    manifest, data = tensors_of(half)
    assert {spec.dtype for spec in manifest} == {"bfloat16"}
    assert len(data) == sum(2 * int(np.prod(spec.shape)) for spec in manifest)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    save_file({"a": np.ones((2, 3), np.float32)}, sharded / "model-00001.safetensors")
    save_file({"b": np.ones(4, np.int64)}, sharded / "model-00002.safetensors")
    found = {name: (entry.dtype, entry.shape) for name, entry in read_folder(sharded).items()}
    assert found == {"a": ("float32", (2, 3)), "b": ("int64", (4,))}
