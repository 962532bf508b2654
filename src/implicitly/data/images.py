"""Small image-classification sets in their public formats: digits, MNIST, CIFAR-10.

Each loader returns an `ImageData`. Where the files come from is decided in one place (`find_folder`): the
folder that the caller names, else the environment variable `IMPLICITLY_DATA`, else the Hugging Face hub. Such
a folder holds one folder per set:

    mnist/    {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz
    cifar10/  cifar10_jpg_{train,test}.tar.gz, each SPLIT/CLASS/NUMBER.jpg

or, in either of them, the parquet files of the hub.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

ENVIRONMENT_VARIABLE = "IMPLICITLY_DATA"
DEFAULT_CACHE = Path("runs") / "cache"
JPEG_NOTE = "images stored as JPEG, quality ~75"

ImageSet = Literal["digits", "mnist", "cifar10"]
Pixels = NDArray[np.uint8]  # (count, channels, height, width)
Labels = NDArray[np.int64]  # (count,)


class DataError(ValueError):
    """A data file is damaged, or is not what its name says; the message says which, and why."""


@dataclass(frozen=True)
class ImageData:
    """A set of labelled images, split in two.

    Attributes:
        train: `(images, labels)`: float32 `(count, channels, height, width)` and int64 `(count,)`. Each
            channel has mean 0 and standard deviation 1 over the training images.
        test: the same, normalised with the statistics of the training images.
        channels, height, width: of one image, in pixels.
        classes: labels are `0 ... classes - 1`.
        name: what the set is called.
        note: what must accompany any number measured on it; empty if it is the set itself.
    """

    train: TensorDataset
    test: TensorDataset
    channels: int
    height: int
    width: int
    classes: int
    name: str
    note: str = ""


def load_images(name: ImageSet, folder: Path | str | None = None, cache: Path | str = DEFAULT_CACHE) -> ImageData:
    """Load the set called `name`; see `digits`, `mnist` and `cifar10` for the arguments and the errors."""
    match name:
        case "digits":
            return digits()
        case "mnist":
            return mnist(folder)
        case "cifar10":
            return cifar10(folder, cache)
        case _:
            raise ValueError(f"unknown image set {name!r}; choose 'digits', 'mnist' or 'cifar10'")


def digits() -> ImageData:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: 1,437 to train, 360 to test.

    The split is stratified by class and always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8).astype(np.uint8)
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, test = ((images[np.asarray(chosen)], labels[np.asarray(chosen)].astype(np.int64)) for chosen in rows)
    return _normalised(train, test, classes=10, name="digits")


def mnist(folder: Path | str | None = None) -> ImageData:
    """MNIST: 60,000 and 10,000 handwritten digits of 28x28 pixels.

    Args:
        folder: holds `mnist/` with the four canonical `.gz` files, or with the hub's parquet files. `None`:
            the folder that `IMPLICITLY_DATA` names, else the hub (`ylecun/mnist`).

    Raises:
        FileNotFoundError: a folder or file is missing, or the hub cannot be reached.
        DataError: a file is damaged, or is not what its name says.
    """
    place = find_folder("mnist", folder)
    if place is None:
        place = _from_hub("mnist", "ylecun/mnist")
    if _has_parquet(place):
        train, test = (_read_parquet(place, split, mode="L") for split in ("train", "test"))
    else:
        train, test = (
            (
                read_idx(place / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)[:, None],
                read_idx(place / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1).astype(np.int64),
            )
            for prefix in ("train", "t10k")
        )
    return _normalised(train, test, classes=10, name="MNIST")


def cifar10(folder: Path | str | None = None, cache: Path | str = DEFAULT_CACHE) -> ImageData:
    """CIFAR-10: 50,000 and 10,000 colour photographs of 32x32 pixels in ten classes.

    Args:
        folder: holds `cifar10/` with `cifar10_jpg_{train,test}.tar.gz`, or with the hub's parquet files.
            `None`: the folder that `IMPLICITLY_DATA` names, else the hub (`uoft-cs/cifar10`).
        cache: where the decoded JPEG images are kept (184 MB), so that only the first call decodes them.

    Raises:
        FileNotFoundError: a folder or file is missing, or the hub cannot be reached.
        DataError: a file is damaged, or is not what its name says.
    """
    place = find_folder("cifar10", folder)
    if place is None:
        place = _from_hub("cifar10", "uoft-cs/cifar10")
    if _has_parquet(place):
        train, test = (_read_parquet(place, split, mode="RGB") for split in ("train", "test"))
        return _normalised(train, test, classes=10, name="CIFAR-10")
    train, test = _read_jpeg_archives(place, Path(cache))
    return _normalised(train, test, classes=10, name="CIFAR-10", note=JPEG_NOTE)


def find_folder(
    name: str, folder: Path | str | None = None, otherwise: str = "download it from the Hugging Face hub"
) -> Path | None:
    """Where the files of the set `name` are: `folder / name`, or `None` if no folder is named.

    `folder=None` stands for the folder that the environment variable `IMPLICITLY_DATA` names. `otherwise` says in
    the error message what happens if none is named.

    Raises:
        FileNotFoundError: a folder was named, and has no folder `name`.
    """
    chosen_by = "the argument folder"
    if folder is None:
        folder = os.environ.get(ENVIRONMENT_VARIABLE) or None
        chosen_by = f"the environment variable {ENVIRONMENT_VARIABLE}"
    if folder is None:
        return None
    place = Path(folder).expanduser() / name
    if not place.is_dir():
        raise FileNotFoundError(
            f"the data set {name!r} was expected in {place.absolute()}, as {chosen_by} is "
            f"{str(folder)!r}, but there is no such folder. Give the folder that contains '{name}/' "
            f"(--data FOLDER, or {ENVIRONMENT_VARIABLE}=FOLDER), or give none to {otherwise}."
        )
    return place


def read_idx(path: Path, dimensions: int) -> Pixels:
    """Read one gzipped file of unsigned bytes in the idx format of MNIST.

    The format: two zero bytes, a type (8: unsigned byte), the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the values (http://yann.lecun.com/exdb/mnist/).

    Args:
        path: a `.gz` file.
        dimensions: how many dimensions the file should have: 3 for images, 1 for labels.

    Returns:
        uint8, of the shape that the file states.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is damaged, or its header or length is not what it should be.
    """
    if not path.is_file():
        raise FileNotFoundError(_missing(path))
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(_damaged(path, str(error))) from error
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic or len(content) < header:
        raise DataError(
            _damaged(path, f"it begins with {content[:4].hex(' ')}, but an idx file begins with {magic.hex(' ')}")
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    expected, found = int(np.prod(shape, dtype=np.int64)), len(content) - header
    if expected != found:
        raise DataError(_damaged(path, f"its header says {shape}: {expected} bytes, but {found} follow"))
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_jpeg_archives(place: Path, cache: Path) -> tuple[tuple[Pixels, Labels], tuple[Pixels, Labels]]:
    """Decode both archives, or read what an earlier call decoded from the very same files."""
    archives = {split: place / f"cifar10_jpg_{split}.tar.gz" for split in ("train", "test")}
    for archive in archives.values():
        if not archive.is_file():
            raise FileNotFoundError(_missing(archive))
    stats = {str(path.resolve()): path.stat() for path in archives.values()}
    stamps = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()]
    key = hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]
    cached = cache / f"cifar10-jpeg-{key}.npz"
    if not cached.is_file():
        train, test = (_decode_archive(archives[split], split) for split in ("train", "test"))
        cache.mkdir(parents=True, exist_ok=True)
        # Written under another name and renamed, so that an interrupted write leaves no partial file under this
        # one.
        partial = cached.with_name(f"{cached.name}.{os.getpid()}.part")
        with partial.open("wb") as file:
            np.savez(file, train_x=train[0], train_y=train[1], test_x=test[0], test_y=test[1])
        partial.replace(cached)
        return train, test
    try:
        with cached.open("rb") as file, np.load(file) as arrays:
            return (arrays["train_x"], arrays["train_y"]), (arrays["test_x"], arrays["test_y"])
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{cached} cannot be read ({error}); delete it, and it will be made again") from error


def _decode_archive(archive: Path, split: str) -> tuple[Pixels, Labels]:
    """Decode `SPLIT/CLASS/NUMBER.jpg`, in the order of the names; classes are numbered alphabetically."""
    files: dict[tuple[str, str], bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = Path(member.name).parts
                content = tar.extractfile(member)
                if content is None or not member.name.endswith(".jpg"):
                    continue
                if len(parts) < 3 or parts[-3] != split:
                    raise DataError(_damaged(archive, f"it holds {member.name}, not {split}/CLASS/NUMBER.jpg"))
                files[parts[-2], parts[-1]] = content.read()
    except (EOFError, tarfile.TarError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(_damaged(archive, str(error))) from error
    names = sorted({label for label, _ in files})
    if len(names) != 10:
        raise DataError(_damaged(archive, f"it holds {len(names)} classes ({', '.join(names)}), not 10"))
    order = sorted(files)
    images = _decode((files[key] for key in order), mode="RGB", source=archive)
    return images, np.array([names.index(label) for label, _ in order], dtype=np.int64)


def _from_hub(name: str, repository: str) -> Path:
    """Download the parquet files of a public data set (or find them in the hub's own cache)."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns="*.parquet"))
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"could not download the data set {name!r} from the Hugging Face hub ({repository}), which is used "
            f"when no folder is given ({type(error).__name__}: {reason}). Without a network, give a "
            f"folder that contains '{name}/': --data FOLDER, or {ENVIRONMENT_VARIABLE}=FOLDER."
        ) from error


def _has_parquet(place: Path) -> bool:
    return any(place.rglob("*.parquet"))


def _read_parquet(place: Path, split: str, mode: Literal["L", "RGB"]) -> tuple[Pixels, Labels]:
    """Read the hub's files: a column of encoded images (`image` or `img`), and one of integers, `label`."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    paths = sorted(place.rglob(f"{split}-*.parquet"))
    if not paths:
        raise FileNotFoundError(_missing(place / f"{split}-*.parquet"))
    images: list[Pixels] = []
    labels: list[Labels] = []
    for path in paths:
        try:
            table = read_table(path)
        except (ArrowInvalid, OSError) as error:
            raise DataError(_damaged(path, str(error))) from error
        column = next((name for name in ("image", "img") if name in table.column_names), None)
        if column is None or "label" not in table.column_names:
            raise DataError(
                _damaged(path, f"its columns are {table.column_names}, not 'image' (or 'img') and 'label'")
            )
        images.append(_decode((row["bytes"] for row in table[column].to_pylist()), mode, source=path))
        labels.append(table["label"].to_numpy().astype(np.int64))
    return np.concatenate(images), np.concatenate(labels)


def _decode(files: Iterable[bytes], mode: Literal["L", "RGB"], source: Path) -> Pixels:
    """Decode image files of one size into `(count, channels, height, width)`."""
    from PIL import Image, UnidentifiedImageError

    images: list[Pixels] = []
    for number, content in enumerate(files):
        try:
            with Image.open(io.BytesIO(content)) as image:
                images.append(np.asarray(image.convert(mode)))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(_damaged(source, f"image number {number}: {error}")) from error
    sizes = {image.shape[:2] for image in images}
    if len(sizes) != 1:
        raise DataError(_damaged(source, f"its {len(images)} images have the sizes {sorted(sizes)}, not one"))
    stacked = np.stack(images)
    return stacked[:, None] if mode == "L" else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def _normalised(
    train: tuple[Pixels, Labels], test: tuple[Pixels, Labels], *, classes: int, name: str, note: str = ""
) -> ImageData:
    """Normalise each channel with the statistics of the training images."""
    for split, (images, labels) in (("training", train), ("test", test)):
        if len(images) != len(labels) or images.shape[1:] != train[0].shape[1:]:
            raise DataError(
                f"{name}: the {split} set has images {images.shape} and {len(labels)} labels; the training "
                f"images are {train[0].shape}"
            )
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise DataError(f"{name}: the {split} labels must be 0 ... {classes - 1}, at least one of them")
    channels, height, width = train[0].shape[1:]
    # A histogram gives the exact statistics of bytes without a floating-point copy of all images.
    counts = np.stack([np.bincount(train[0][:, c].ravel(), minlength=256) for c in range(channels)])
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ np.arange(256)
    std = np.sqrt((weights * (np.arange(256) - mean[:, None]) ** 2).sum(axis=1))
    std[std == 0] = 1.0

    def dataset(images: Pixels, labels: Labels) -> TensorDataset:
        shape = (1, channels, 1, 1)
        pixels = torch.tensor(images).float()
        pixels.sub_(torch.from_numpy(mean).float().view(shape)).div_(torch.from_numpy(std).float().view(shape))
        return TensorDataset(pixels, torch.tensor(labels))

    return ImageData(dataset(*train), dataset(*test), channels, height, width, classes, name, note)


def _missing(path: Path) -> str:
    return (
        f"there is no file {path.absolute()}. Give another folder (--data FOLDER, or "
        f"{ENVIRONMENT_VARIABLE}=FOLDER), or none to download from the Hugging Face hub."
    )


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged, or is not what its name says: {reason}. Download it again."
