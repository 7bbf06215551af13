from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from paramserver.errors import DataError
from workers import datafiles
from workers.datafiles import DataFile, DataSet
from workers.datasets import (
    ADULT,
    FASHION_MNIST,
    MNIST,
    parse_idx,
    parse_libsvm,
    read_adult,
    read_images,
)

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
CONTENT = b"\x00\x00\x08\x03" + np.array(IMAGES.shape, ">u4").tobytes() + IMAGES.tobytes()
PACKED = gzip.compress(CONTENT, mtime=0)
NAME = "tiny-images-idx3-ubyte"


def tiny(*mirrors: str, packed: bytes = PACKED) -> DataSet:
    """A data set of one file, in the layouts of the real ones."""
    file = DataFile(
        name=NAME,
        packing=".gz",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        packed_sha256=hashlib.sha256(packed).hexdigest(),
    )
    return DataSet(
        name="tiny", task="tiny", files=(file,), mirrors=mirrors, other_folders=("Tiny/raw",)
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no folder of the user's, and no proxy on the way to the loopback."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PARAMSERVER_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "xdg" / "paramserver"


class Mirror(http.server.ThreadingHTTPServer):
    """Serves ``files`` on the loopback and counts the requests."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror({f"/{NAME}.gz": PACKED}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="mirror")
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def dead_url() -> str:
    with Mirror({}) as server:
        return server.url  # nobody listens any more


@pytest.mark.parametrize("subfolder", ["", "tiny", "Tiny/raw"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("named_by", ["data_dir", "PARAMSERVER_DATA", "cache"])
def test_a_file_is_found_in_every_layout(
    subfolder: str,
    packed: bool,
    named_by: str,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = cache if named_by == "cache" else tmp_path / "mine"
    if named_by == "PARAMSERVER_DATA":
        monkeypatch.setenv("PARAMSERVER_DATA", str(root))
    folder = root / subfolder
    folder.mkdir(parents=True)
    path = folder / (f"{NAME}.gz" if packed else NAME)
    path.write_bytes(PACKED if packed else CONTENT)

    found = tiny().read(data_dir=str(root) if named_by == "data_dir" else None)

    assert found == [CONTENT]
    assert list(folder.iterdir()) == [path]  # nothing is written to it


def test_a_copy_in_another_wrapping_is_the_same_data(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.gz").write_bytes(gzip.compress(CONTENT, compresslevel=1, mtime=7))

    assert tiny().read(data_dir=str(tmp_path)) == [CONTENT]


def test_missing_data_says_where_it_was_sought_and_how_to_get_it(
    tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(DataError) as error:
        tiny().read(data_dir=str(tmp_path / "mine"))

    message = str(error.value)
    assert f"there is no {NAME}.gz" in message
    assert f"{tmp_path / 'mine'}, {cache}" in message
    assert "`paramserver train --task tiny:download=true`" in message
    assert "PARAMSERVER_DATA" in message


def test_altered_data_names_the_file_and_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(CONTENT + b"!")

    with pytest.raises(DataError) as error:
        tiny().read(data_dir=str(tmp_path))

    message = str(error.value)
    assert message.startswith(f"{path} is altered or cut short")
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert hashlib.sha256(CONTENT + b"!").hexdigest() in message


def test_a_packed_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.gz").write_bytes(PACKED[:-20])

    with pytest.raises(DataError, match=r"tiny-images-idx3-ubyte\.gz cannot be read: "):
        tiny().read(data_dir=str(tmp_path))


def test_a_good_copy_elsewhere_is_used_instead_of_an_altered_one(
    tmp_path: Path, cache: Path
) -> None:
    (tmp_path / NAME).write_bytes(b"the file of another data set")
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT)

    assert tiny().read(data_dir=str(tmp_path)) == [CONTENT]


def test_a_download_goes_to_the_cache_once(mirror: Mirror, cache: Path) -> None:
    data = tiny(mirror.url)

    first, again = data.read(download=True), data.read(download=False)

    assert first == again == [CONTENT]
    assert (cache / "tiny" / f"{NAME}.gz").read_bytes() == PACKED
    assert mirror.requests == [f"/{NAME}.gz"]


def test_nothing_is_downloaded_unless_asked_for(mirror: Mirror) -> None:
    with pytest.raises(DataError, match="there is no tiny-images"):
        tiny(mirror.url).read()

    assert mirror.requests == []


def test_processes_that_download_at_once_make_one_request(mirror: Mirror) -> None:
    data = tiny(mirror.url)
    found: list[list[bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.append(data.read(download=True))) for _ in range(4)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [[CONTENT]] * 4
    assert mirror.requests == [f"/{NAME}.gz"]


def test_a_damaged_file_in_the_cache_is_fetched_again(mirror: Mirror, cache: Path) -> None:
    (cache / "tiny").mkdir(parents=True)
    (cache / "tiny" / f"{NAME}.gz").write_bytes(PACKED[:-1])

    assert tiny(mirror.url).read(download=True) == [CONTENT]


def test_a_dead_mirror_is_passed_over(mirror: Mirror, dead_url: str) -> None:
    assert tiny(dead_url, mirror.url).read(download=True) == [CONTENT]


def test_offline_the_error_names_every_mirror_and_the_way_out(dead_url: str, cache: Path) -> None:
    with pytest.raises(DataError) as error:
        tiny(dead_url, f"{dead_url}other/").read(download=True)

    message = str(error.value)
    assert message.startswith(f"tiny: no mirror gave {NAME}.gz. Put it in {cache / 'tiny'}")
    assert f"{dead_url}: " in message
    assert f"{dead_url}other/: " in message


def test_a_mirror_with_other_content_is_refused(mirror: Mirror, cache: Path) -> None:
    mirror.files[f"/{NAME}.gz"] = gzip.compress(b"something else")

    with pytest.raises(DataError, match=r"no mirror gave .* does not match the known hash"):
        tiny(mirror.url).read(download=True)

    assert not list(cache.rglob("*.gz"))


def test_a_cache_that_cannot_be_written_is_named(mirror: Mirror, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the way")

    with pytest.raises(DataError, match=r"^tiny: tiny-images-idx3-ubyte\.gz cannot be put in "):
        tiny(mirror.url).read(download=True)


def test_a_download_that_never_ends_elsewhere_is_not_waited_for_for_ever(
    mirror: Mirror, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datafiles, "_DOWNLOAD_LOCK_TIMEOUT_S", 0.01)
    (cache / "tiny").mkdir(parents=True)

    with (
        datafiles.filelock.FileLock(cache / "tiny" / f"{NAME}.gz.lock"),
        pytest.raises(DataError, match="could not be acquired"),
    ):
        tiny(mirror.url).read(download=True)


def test_idx_keeps_shape_and_values() -> None:
    images = parse_idx(CONTENT)

    assert images.dtype == torch.uint8
    assert images.tolist() == IMAGES.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x00\x00\x0d\x01" + CONTENT[4:], "starts with 00000d01"),
        (CONTENT[:9], "header of 16 bytes is cut short at 9"),
        (CONTENT[:-1], r"shape \[2, 3, 4\] holds 23 bytes"),
    ],
)
def test_what_is_not_idx_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_idx(content)


def test_libsvm_indices_start_at_zero() -> None:
    features, labels = parse_libsvm(b"-1 0:1 3:0.5\n+1\n+1 1:2\n", num_features=4)

    assert features.tolist() == [[1, 0, 0, 0.5], [0, 0, 0, 0], [0, 2, 0, 0]]
    assert labels.tolist() == [-1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"+1 0:1\n+1 zero:1\n", r"^line 2 is not 'label index:value …'"),
        (b"\n", "^line 1 is not"),
        (b"+1 4:1\n", r"^indices must be 0 to 3, got 4 to 4"),
    ],
)
def test_what_is_not_libsvm_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_libsvm(content, num_features=4)


REAL = Path(os.environ.get("PARAMSERVER_DATA", "no PARAMSERVER_DATA"))


def real_folder(data: DataSet) -> str:
    """The folder with the real data, or skip."""
    if not (REAL / data.name).is_dir():
        pytest.skip(f"{data.name} is not in $PARAMSERVER_DATA")
    return str(REAL)


@pytest.mark.data
@pytest.mark.parametrize(("data", "mean"), [(MNIST, 0.1307), (FASHION_MNIST, 0.2860)])
def test_real_images_are_the_published_ones(data: DataSet, mean: float) -> None:
    train, train_classes, test, test_classes = read_images(data, data_dir=real_folder(data))

    assert (train.shape, test.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert (len(train_classes), len(test_classes)) == (60_000, 10_000)
    assert train_classes.unique().tolist() == test_classes.unique().tolist() == list(range(10))
    assert (train.double().mean() / 255).item() == pytest.approx(mean, abs=1e-4)


@pytest.mark.data
def test_torchvisions_layout_is_read(tmp_path: Path) -> None:
    source = Path(real_folder(MNIST)) / "mnist"
    shutil.copytree(source, tmp_path / "MNIST" / "raw")

    assert read_images(MNIST, data_dir=str(tmp_path))[3].shape == (10_000,)


@pytest.mark.data
def test_real_adult_is_the_published_one() -> None:
    train, train_labels, test, test_labels = read_adult(data_dir=real_folder(ADULT))

    assert (train.shape, test.shape) == ((32_561, 123), (16_281, 123))
    assert train.count_nonzero() == 451_592
    assert set(train.unique().tolist()) == {0.0, 1.0}
    assert (train_labels == 1).sum() == 7_841
    assert set(test_labels.tolist()) == {-1.0, 1.0}
