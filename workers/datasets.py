"""The public data sets behind the shipped tasks, read into tensors without torchvision."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from paramserver.errors import DataError
from workers.datafiles import DataFile, DataSet

ADULT_FEATURES = 123
"""Binary features of Adult in the a9a encoding."""


def _idx(name: str, sha256: str, packed_sha256: str) -> DataFile:
    return DataFile(name=name, packing=".gz", sha256=sha256, packed_sha256=packed_sha256)


MNIST = DataSet(
    name="mnist",
    task="mnist",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    other_folders=("MNIST/raw",),
    files=(
        _idx(
            "train-images-idx3-ubyte",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        _idx(
            "train-labels-idx1-ubyte",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        _idx(
            "t10k-images-idx3-ubyte",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        _idx(
            "t10k-labels-idx1-ubyte",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
)

FASHION_MNIST = DataSet(
    name="fashion-mnist",
    task="fashion-mnist",
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    other_folders=("FashionMNIST/raw",),
    system_folders=("/usr/share/datasets/fashion-mnist",),  # Debian: dataset-fashion-mnist
    files=(
        _idx(
            "train-images-idx3-ubyte",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        _idx(
            "train-labels-idx1-ubyte",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        _idx(
            "t10k-images-idx3-ubyte",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        _idx(
            "t10k-labels-idx1-ubyte",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
)

ADULT = DataSet(
    name="adult-libsvm",
    task="logistic",
    mirrors=(
        "https://raw.githubusercontent.com/X-DataInitiative/tick-datasets/master/binary/adult/",
    ),
    files=(
        DataFile(
            name="adult.trn",
            packing=".bz2",
            sha256="64bf51ab7ce8101364b2d6b569c7bad8f04a4f9684527ff232a0f06474ae35c2",
            packed_sha256="73ce74d43bbfc988b08e6ecf738cf5484f19dafa143c31f702f3a8b779d277e5",
        ),
        DataFile(
            name="adult.tst",
            packing=".bz2",
            sha256="8de2963e337b73465257c78c8b4b1dbba40c07b0e56a58308f3f10cbde8ed7b8",
            packed_sha256="bdb2ec9642e77947a67269471506b18bc4dcf03413f44814dc24833432ba818d",
        ),
    ),
)

_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TINYSHAKESPEARE = DataSet(
    name="tinyshakespeare",
    task="tinyshakespeare",
    mirrors=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/"
        "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/",
    ),
    files=(
        DataFile(name="input.txt", packing="", sha256=_SHAKESPEARE, packed_sha256=_SHAKESPEARE),
    ),
)


def read_images(
    data: DataSet, *, data_dir: str | None = None, download: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels; uint8, ``(n, 28, 28)``, ``(n,)``.

    Raises:
        DataError: As `DataSet.read`.
    """
    parts = [parse_idx(content) for content in data.read(data_dir=data_dir, download=download)]
    train_images, train_labels, test_images, test_labels = parts
    return train_images, train_labels, test_images, test_labels


def read_adult(
    *, data_dir: str | None = None, download: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training features and labels, test features and labels, float32.

    Features have shape ``(n, 123)`` and are 0 or 1; labels are -1 (earns at most 50,000 a year) or
    +1, shape ``(n,)``.

    Raises:
        DataError: As `DataSet.read`.
    """
    train, test = ADULT.read(data_dir=data_dir, download=download)
    return *parse_libsvm(train, ADULT_FEATURES), *parse_libsvm(test, ADULT_FEATURES)


def read_text(*, data_dir: str | None = None, download: bool = False) -> tuple[Tensor, int]:
    """Return tinyshakespeare as numbers of characters, uint8, and how many there are, 65.

    A character's number is its place among those of the text, in the order of their codes.

    Raises:
        DataError: As `DataSet.read`.
    """
    (content,) = TINYSHAKESPEARE.read(data_dir=data_dir, download=download)
    codes = np.frombuffer(content, dtype=np.uint8)
    characters, numbers = np.unique(codes, return_inverse=True)
    return torch.from_numpy(numbers.astype(np.uint8)), len(characters)


def parse_idx(content: bytes) -> Tensor:
    """Read an IDX file of bytes: uint8, its shape as in the file's header.

    Raises:
        DataError: The header is not that of an IDX file of bytes, or does not fit the length.

    Source: Yann LeCun's page on MNIST: a big-endian ``00 00 08 ndim``, ndim sizes, the data.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(
            f"not an IDX file of bytes: it starts with {content[:4].hex() or 'nothing'}"
        )
    ndim = content[3]
    offset = 4 + 4 * ndim
    if len(content) < offset:
        raise DataError(f"an IDX header of {offset} bytes is cut short at {len(content)}")
    shape = np.frombuffer(content, dtype=">u4", count=ndim, offset=4).tolist()
    data = np.frombuffer(content, dtype=np.uint8, offset=offset)
    if data.size != np.prod(shape, dtype=np.int64):
        raise DataError(f"an IDX file of shape {shape} holds {data.size} bytes")
    return torch.from_numpy(data.reshape(shape).copy())


def parse_libsvm(content: bytes, num_features: int) -> tuple[Tensor, Tensor]:
    """Read LIBSVM text with indices from 0 into dense ``(n, num_features)`` and ``(n,)``, float32.

    Raises:
        DataError: A line is not ``label index:value …``, or an index is out of range.
    """
    rows, columns, values, labels = [], [], [], []
    for row, line in enumerate(content.splitlines()):
        try:
            label, *pairs = line.split()
            labels.append(float(label))
            for pair in pairs:
                column, value = pair.split(b":")
                rows.append(row)
                columns.append(int(column))
                values.append(float(value))
        except ValueError:
            raise DataError(f"line {row + 1} is not 'label index:value …': {line[:60]!r}") from None
    if columns and not 0 <= min(columns) <= max(columns) < num_features:
        raise DataError(
            f"indices must be 0 to {num_features - 1}, got {min(columns)} to {max(columns)}"
        )
    features = torch.zeros(len(labels), num_features)
    features[rows, columns] = torch.tensor(values)
    return features, torch.tensor(labels)
