"""The loaders read what the formats say, and refuse what they don't, with a message that helps."""

import gzip
import io
import os
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("PIL", reason="needs the extra: implicitly[recipes]")

from PIL import Image

from implicitly.data import DataError, cifar10, digits, load_images, mnist
from implicitly.data.images import JPEG_NOTE, _decode_archive, read_idx

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def encode(pixels, format, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def write_parquet(path, column, images, labels):
    arrow = pytest.importorskip("pyarrow", reason="needs the extra: implicitly[recipes]")
    from pyarrow.parquet import write_table

    rows = [{"bytes": encode(image, "PNG"), "path": f"{n}.png"} for n, image in enumerate(images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(arrow.table({column: rows, "label": labels}), path)


@pytest.fixture
def small_mnist():
    """Arrays of a tiny MNIST: (train images, train labels, test images, test labels)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 50, dtype=np.uint8)
    return images[:40], labels[:40], images[40:], labels[40:]


@pytest.fixture
def mnist_folder(tmp_path, small_mnist):
    """A data folder that holds the tiny MNIST in its canonical format."""
    place = tmp_path / "data" / "mnist"
    place.mkdir(parents=True)
    for prefix, images, labels in (("train", *small_mnist[:2]), ("t10k", *small_mnist[2:])):
        write_idx(place / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(place / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path / "data"


def write_jpeg_archive(path, split, per_class, classes=CLASSES):
    """A tiny CIFAR-10 archive in which every image of class k is one grey of 20 k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for label, name in reversed(list(enumerate(classes))):
            for number in range(per_class):
                content = encode(np.full((32, 32, 3), 20 * label, dtype=np.uint8), "JPEG", quality=75)
                member = tarfile.TarInfo(f"{split}/{name}/{number:04}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def cifar_folder(tmp_path):
    for split, per_class in (("train", 3), ("test", 1)):
        write_jpeg_archive(tmp_path / "cifar10" / f"cifar10_jpg_{split}.tar.gz", split, per_class)
    return tmp_path


def test_digits_split_is_stratified_fixed_and_normalised():
    data = digits()
    images, labels = data.train.tensors
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert data.test.tensors[0].shape == (360, 1, 8, 8)
    assert (data.channels, data.height, data.width, data.classes, data.note) == (1, 8, 8, 10, "")
    shares = labels.bincount() / (labels.bincount() + data.test.tensors[1].bincount())
    assert shares.min() > 0.79
    assert shares.max() < 0.81
    assert images.mean().abs() < 1e-5
    assert (images.std(correction=0) - 1).abs() < 1e-5
    again = digits()
    for first, second in zip(data.train.tensors + data.test.tensors, again.train.tensors + again.test.tensors):
        assert torch.equal(first, second)


def test_mnist_holds_the_pixels_normalised_by_the_training_set(mnist_folder, small_mnist):
    data = mnist(mnist_folder)
    train_images, train_labels, test_images, test_labels = small_mnist
    mean, std = train_images.astype(float).mean(), train_images.astype(float).std()
    for split, images, labels in (
        (data.train, train_images, train_labels),
        (data.test, test_images, test_labels),
    ):
        found_images, found_labels = split.tensors
        expected = torch.tensor((images[:, None] - mean) / std, dtype=torch.float32)
        torch.testing.assert_close(found_images, expected, rtol=1e-5, atol=1e-5)
        assert found_labels.tolist() == labels.tolist()
    assert (data.channels, data.height, data.width, data.name) == (1, 28, 28, "MNIST")


def test_parquet_of_the_hub_and_idx_are_the_same_data(mnist_folder, small_mnist, tmp_path):
    other = tmp_path / "hub"
    write_parquet(
        other / "mnist" / "mnist" / "train-00000-of-00002.parquet",
        "image",
        *(a[:25] for a in small_mnist[:2]),
    )
    write_parquet(
        other / "mnist" / "mnist" / "train-00001-of-00002.parquet",
        "image",
        *(a[25:] for a in small_mnist[:2]),
    )
    write_parquet(other / "mnist" / "mnist" / "test-00000-of-00001.parquet", "image", *small_mnist[2:])
    ours, theirs = mnist(mnist_folder), mnist(other)
    for first, second in zip(ours.train.tensors + ours.test.tensors, theirs.train.tensors + theirs.test.tensors):
        assert torch.equal(first, second)


def test_hub_is_asked_where_no_folder_is_named(monkeypatch, tmp_path, small_mnist, mnist_folder):
    """The hub's own cache is filled by hand, and the hub kept offline: what is found comes from there."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs implicitly[recipes]")
    monkeypatch.delenv("IMPLICITLY_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"'mnist' from the Hugging Face hub \(ylecun/mnist\)") as failure:
        mnist()
    assert "--data FOLDER, or IMPLICITLY_DATA=FOLDER" in str(failure.value)
    assert "\n" not in str(failure.value)

    commit = "0" * 40
    repository = tmp_path / "cache" / "datasets--ylecun--mnist"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit / "mnist"
    write_parquet(snapshot / "train-00000-of-00001.parquet", "image", *small_mnist[:2])
    write_parquet(snapshot / "test-00000-of-00001.parquet", "image", *small_mnist[2:])
    assert torch.equal(mnist().train.tensors[0], mnist(mnist_folder).train.tensors[0])


def test_cifar_from_parquet_is_in_colour_and_needs_no_note(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = [n % 10 for n in range(12)]
    for split in ("train", "test"):
        write_parquet(
            tmp_path / "cifar10" / "plain_text" / f"{split}-00000-of-00001.parquet", "img", images, labels
        )
    data = cifar10(tmp_path)
    mean, std = images.astype(float).mean(axis=(0, 1, 2)), images.astype(float).std(axis=(0, 1, 2))
    expected = torch.tensor(((images - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    torch.testing.assert_close(data.train.tensors[0], expected, rtol=1e-5, atol=1e-5)
    assert data.train.tensors[1].tolist() == labels
    assert data.note == ""


def test_cifar_classes_are_numbered_alphabetically_and_jpeg_is_said(cifar_folder, tmp_path):
    data = cifar10(cifar_folder, cache=tmp_path / "cache")
    images, labels = data.train.tensors
    assert images.shape == (30, 3, 32, 32)
    assert labels.bincount().tolist() == [3] * 10
    assert data.note == JPEG_NOTE
    # Every image is one grey that grows with its class, so their order tells whether labels fit images.
    greys = images.mean(dim=(1, 2, 3))
    assert torch.equal(greys.argsort(stable=True), labels.argsort(stable=True))


def test_cifar_is_decoded_once_for_the_same_files(cifar_folder, tmp_path):
    cache = tmp_path / "cache"
    first = cifar10(cifar_folder, cache)
    archive = cifar_folder / "cifar10" / "cifar10_jpg_train.tar.gz"
    stat = archive.stat()
    archive.write_bytes(bytes(stat.st_size))  # no archive any more, though it has the size and the time of one
    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(cifar10(cifar_folder, cache).train.tensors[0], first.train.tensors[0])

    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # another file: decode again
    with pytest.raises(DataError, match=re.escape(str(archive))):
        cifar10(cifar_folder, cache)


def test_damaged_cache_says_which_file_to_delete(cifar_folder, tmp_path):
    cache = tmp_path / "cache"
    cifar10(cifar_folder, cache)
    (cached,) = cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(DataError, match=re.escape(str(cached)) + ".*delete it"):
        cifar10(cifar_folder, cache)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "Not a gzipped file"),
        (gzip.compress(bytes([0, 0, 8, 3]) + bytes(12))[:-9], "ended before"),
        (
            gzip.compress(bytes([0, 0, 13, 3]) + bytes(12)),
            "begins with 00 00 0d 03, but an idx file begins with 00 00 08 03",
        ),
        (gzip.compress(bytes([0, 0, 8, 1]) + bytes(4)), "begins with 00 00 08 01"),
        (gzip.compress(bytes([0, 0, 8, 3]) + bytes(3)), "begins with"),
        (
            gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 28, 28) + bytes(1000)),
            r"its header says \(2, 28, 28\): 1568 bytes, but 1000 follow",
        ),
    ],
    # Not the bytes: gzip writes the time into them, and workers must collect the same names.
    ids=["no gzip", "cut short", "float", "labels", "no header", "wrong size"],
)
def test_damaged_idx_is_refused(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){re.escape(str(path))} is damaged.*{message}"):
        read_idx(path, dimensions=3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "is damaged"),
        (lambda path: path.write_bytes(b"nonsense"), "is damaged"),
        (lambda path: write_jpeg_archive(path, "test", 1), r"not train/CLASS/NUMBER\.jpg"),
        (lambda path: write_jpeg_archive(path, "train", 1, CLASSES[:4]), "4 classes .*, not 10"),
    ],
)
def test_damaged_archive_is_refused(cifar_folder, tmp_path, damage, message):
    archive = cifar_folder / "cifar10" / "cifar10_jpg_train.tar.gz"
    damage(archive)
    with pytest.raises(DataError, match=message) as failure:
        cifar10(cifar_folder, tmp_path / "cache")
    assert str(archive) in str(failure.value)
    assert not (tmp_path / "cache").exists()


def test_parquet_with_other_columns_is_refused(tmp_path, small_mnist):
    path = tmp_path / "mnist" / "train-00000-of-00001.parquet"
    write_parquet(path, "picture", *small_mnist[:2])
    with pytest.raises(DataError, match=r"its columns are \['picture', 'label'\]"):
        mnist(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        mnist(tmp_path)


def test_labels_out_of_range_are_refused(mnist_folder):
    write_idx(mnist_folder / "mnist" / "train-labels-idx1-ubyte.gz", np.full(40, 10, dtype=np.uint8))
    with pytest.raises(DataError, match=r"labels must be 0 \.\.\. 9"):
        mnist(mnist_folder)
    write_idx(mnist_folder / "mnist" / "train-labels-idx1-ubyte.gz", np.zeros(39, dtype=np.uint8))
    with pytest.raises(DataError, match="39 labels"):
        mnist(mnist_folder)


def test_missing_folder_and_file_say_where_and_what_to_do(monkeypatch, mnist_folder, tmp_path):
    with pytest.raises(FileNotFoundError) as failure:
        load_images("mnist", tmp_path / "nowhere")
    message = str(failure.value)
    assert str(tmp_path / "nowhere" / "mnist") in message
    assert "--data FOLDER" in message

    monkeypatch.setenv("IMPLICITLY_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"environment variable IMPLICITLY_DATA is .*elsewhere"):
        load_images("cifar10")
    assert len(load_images("mnist", mnist_folder).train) == 40  # the argument goes before the variable
    monkeypatch.setenv("IMPLICITLY_DATA", str(mnist_folder))
    assert len(load_images("mnist").train) == 40

    (mnist_folder / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*t10k-labels-idx1-ubyte\.gz"):
        load_images("mnist")


def test_unknown_set_is_refused():
    with pytest.raises(ValueError, match="unknown image set 'imagenet'"):
        load_images("imagenet")  # type: ignore[arg-type]


def real_data(name):
    folder = os.environ.get("IMPLICITLY_DATA")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"needs the real {name} in the folder that IMPLICITLY_DATA names")
    return Path(folder)


def test_real_mnist():
    data = mnist(real_data("mnist"))
    assert len(data.train) == 60_000
    assert len(data.test) == 10_000
    # The class counts that everybody finds in MNIST.
    assert data.test.tensors[1].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_real_cifar10_test_set():
    images, labels = _decode_archive(real_data("cifar10") / "cifar10" / "cifar10_jpg_test.tar.gz", "test")
    assert images.shape == (10_000, 3, 32, 32)
    assert np.bincount(labels).tolist() == [1000] * 10
    # Means of CIFAR-10's test set, in bytes: red, green, blue.
    np.testing.assert_allclose(images.mean(axis=(0, 2, 3)), [126.0, 123.7, 114.9], atol=0.5)
