from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paramserver.errors import RecordError
from paramserver.layout import Layout
from paramserver.trajectory import Trajectory, read_trajectory, rewind

LAYOUT = Layout.of(nn.Linear(3, 2))


def at(value: float) -> Tensor:
    return torch.full((LAYOUT.numel,), value)


def kept(folder: Path, versions: list[int], most: int = 100) -> tuple[int, ...]:
    trajectory = Trajectory(folder, LAYOUT, most)
    for version in versions:
        trajectory.add(version, at(float(version)))
    snapshots = read_trajectory(folder)
    assert snapshots is not None
    assert [float(vector[0]) for vector in snapshots.vectors] == list(snapshots.versions)
    return snapshots.versions


def test_what_was_added_is_read_in_the_order_of_versions(tmp_path: Path) -> None:
    assert kept(tmp_path / "t", [0, 9, 10, 100]) == (0, 9, 10, 100)


def test_the_layout_is_read_with_the_snapshots(tmp_path: Path) -> None:
    kept(tmp_path / "t", [0])

    snapshots = read_trajectory(tmp_path / "t")

    assert snapshots is not None
    assert snapshots.layout.fingerprint == LAYOUT.fingerprint


def test_a_version_that_comes_again_takes_its_own_place(tmp_path: Path) -> None:
    assert kept(tmp_path / "t", [0, 5, 5]) == (0, 5)


@pytest.mark.parametrize("number", [3, 4, 10, 33])
def test_too_many_are_thinned_evenly_and_the_ends_stay(tmp_path: Path, number: int) -> None:
    versions = kept(tmp_path / "t", list(range(0, 700, 7)), most=number)

    gaps = [b - a for a, b in itertools.pairwise(versions)]
    assert len(versions) == number
    assert (versions[0], versions[-1]) == (0, 693)
    assert max(gaps) <= 3 * 693 / (number - 1)


def test_a_run_that_goes_on_forgets_what_came_later(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    kept(folder, [0, 5, 10, 15])
    (folder / "v20.safetensors.tmp").write_bytes(b"cut sho")

    rewind(folder, 10)

    assert sorted(path.name for path in folder.iterdir()) == [
        "v0.safetensors", "v10.safetensors", "v5.safetensors",
    ]  # fmt: skip


def test_nothing_is_read_where_nothing_is(tmp_path: Path) -> None:
    assert read_trajectory(tmp_path / "t") is None


def test_a_snapshot_that_is_not_finite_is_named(tmp_path: Path) -> None:
    Trajectory(tmp_path / "t", LAYOUT, 5).add(7, at(float("nan")))

    with pytest.raises(RecordError, match=r"v7.safetensors holds parameters that are not finite"):
        read_trajectory(tmp_path / "t")


def test_a_snapshot_that_is_damaged_is_named(tmp_path: Path) -> None:
    kept(tmp_path, [0, 5])
    (tmp_path / "v5.safetensors").write_bytes(b"something else")

    with pytest.raises(RecordError, match=r"cannot read .*v5.safetensors"):
        read_trajectory(tmp_path)


def test_a_snapshot_of_another_model_is_named(tmp_path: Path) -> None:
    kept(tmp_path, [0])
    other = Layout.of(nn.Linear(3, 1))
    Trajectory(tmp_path, other, 5).add(4, torch.zeros(other.numel))

    with pytest.raises(RecordError, match=r"v4.safetensors is of another model .*weight"):
        read_trajectory(tmp_path)


def test_a_full_disk_is_told_of_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(tmp_path, [0, 5])

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("paramserver.trajectory.write_durably", full)
    with pytest.raises(RecordError, match=r"No space left.*keep fewer snapshots"):
        Trajectory(tmp_path, LAYOUT, 5).add(7, at(1.0))

    monkeypatch.undo()
    snapshots = read_trajectory(tmp_path)
    assert snapshots is not None
    assert snapshots.versions == (0, 5)
