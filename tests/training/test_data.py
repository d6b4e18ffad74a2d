"""Batches are a function of (seed, epoch, position); readers understand the formats as published."""

import pickle
import tarfile

import numpy as np
import pytest
import torch

from fusedres.training.config import ConfigError, TrainConfig
from fusedres.training.data import EpochOrder, load_data, read_cifar10, scan_image_folder

CPU = torch.device("cpu")


def load(rank=0, world_size=1, **settings):
    config = TrainConfig.from_settings({"batch_size": 16, **settings})
    return load_data(config, device=CPU, rank=rank, world_size=world_size)


def equal(a, b):
    return all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


# --- order and augmentation


def test_epoch_order_covers_each_image_once():
    order = EpochOrder(100, 10, seed=3)
    epoch = order.batches(0)
    assert sorted(index for batch in epoch for index in batch) == list(range(100))
    assert epoch != order.batches(1)
    assert epoch == order.batches(0)
    assert order.batches(0, start=7) == epoch[7:]


def test_ranks_share_an_epoch():
    orders = [EpochOrder(101, 10, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert [order.steps for order in orders] == [5, 5]
    seen = [index for order in orders for batch in order.batches(4) for index in batch]
    assert len(seen) == len(set(seen)) == 100


def test_batch_size_beyond_the_images():
    with pytest.raises(
        ConfigError, match="--batch-size 60 is more than the 50 training images there are for each of 2"
    ):
        EpochOrder(101, 60, world_size=2)


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_repeat_from_any_position(channels_last):
    data = load(data="synthetic:64", image_size=16, channels_last=channels_last)
    epoch = list(data.train_batches(2))
    assert equal(epoch, data.train_batches(2))
    assert equal(epoch[3:], data.train_batches(2, start=3))
    assert not torch.equal(epoch[0][0], next(data.train_batches(3))[0])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert epoch[0][0].is_contiguous(memory_format=memory_format)


def test_shift_is_a_shift():
    data = load(data="digits", image_size=8)
    (images, labels), indices = next(data.train_batches(0)), data.order.batches(0)[0]
    assert torch.equal(labels, data.labels[indices])
    for image, index in zip(images, indices, strict=True):
        padded = ((data.images[index].float() - data.mean) / data.std)[..., 0]
        shifts = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        assert any(torch.equal(image[0], shifted) for shifted in shifts)


def test_mirroring_is_a_mirror(tmp_path):
    write_cifar10_binary(tmp_path, per_file=8)
    data = load(data=f"cifar10:{tmp_path}", batch_size=40)
    images, indices = next(data.train_batches(0))[0], data.order.batches(0)[0]
    mirrored = 0
    for image, index in zip(images, indices, strict=True):
        padded = ((data.images[index].float() - data.mean) / data.std).permute(2, 0, 1)
        crops = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        straight = any(torch.equal(image, crop) for crop in crops)
        assert straight or any(torch.equal(image, crop.flip(2)) for crop in crops)
        mirrored += not straight
    assert 8 <= mirrored <= 32


def test_one_channel_keeps_the_format_asked_for():
    images, _ = next(load(data="digits", image_size=8, channels_last=True).train_batches(0))
    assert images.stride() == (64, 1, 8, 1)
    images, _ = next(load(data="digits", image_size=8, channels_last=False).train_batches(0))
    assert images.stride() == (64, 64, 8, 1)


def test_digits():
    data = load(data="digits")
    assert (data.train_size, data.test_size, data.channels) == (1442, 355, 1)
    assert torch.bincount(data.labels).min() >= 139
    assert torch.bincount(data.test_labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    images, _ = next(data.train_batches(0))
    assert images.shape == (16, 1, 32, 32)
    stack = torch.cat([x for x, _ in data.train_batches(0)])
    assert abs(stack.mean().item()) < 0.1
    assert abs(stack.std().item() - 1) < 0.1


def test_synthetic_is_learnable_and_repeatable():
    first, second = load(data="synthetic:40"), load(data="synthetic:40")
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, load(data="synthetic:40", seed=1).images)
    inside = first.images[:, 4:-4, 4:-4].float()
    within = (inside[first.labels == 0] - inside[first.labels == 0].mean(0)).pow(2).mean()
    between = (inside[first.labels == 0].mean(0) - inside[first.labels == 1].mean(0)).pow(2).mean()
    assert between > within / 4


def test_test_images_are_shared_between_ranks():
    whole = torch.cat([labels for _, labels in load(data="digits").test_batches()])
    parts = [
        torch.cat([y for _, y in load(rank=rank, world_size=2, data="digits").test_batches()]) for rank in range(2)
    ]
    assert torch.equal(parts[0], whole[0::2])
    assert torch.equal(parts[1], whole[1::2])


# --- CIFAR-10


def cifar10_batches(per_file=4):
    generator = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {
        name: (generator.integers(0, 256, (per_file, 3072), dtype=np.uint8), generator.integers(0, 10, per_file))
        for name in names
    }


def write_cifar10_binary(folder, per_file=4):
    batches = cifar10_batches(per_file)
    for name, (pixels, labels) in batches.items():
        records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return batches


def write_cifar10_python(folder, per_file=4):
    batches = cifar10_batches(per_file)
    for name, (pixels, labels) in batches.items():
        content = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": pixels, b"filenames": []}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(b"not read")
    return batches


def check_cifar10(read, batches):
    (images, labels), (test_images, test_labels) = read
    wanted = np.concatenate([batches[f"data_batch_{i}"][0] for i in range(1, 6)])
    assert torch.equal(images, torch.from_numpy(wanted.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()))
    assert labels.tolist() == np.concatenate([batches[f"data_batch_{i}"][1] for i in range(1, 6)]).tolist()
    # The format: 1,024 red values row by row, then green, then blue.
    assert test_images[1, 2, 3].tolist() == [
        batches["test_batch"][0][1][plane * 1024 + 2 * 32 + 3] for plane in range(3)
    ]
    assert test_labels.tolist() == batches["test_batch"][1].tolist()


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("where", ["folder", "parent", "archive", "folder of archive"])
def test_cifar10(tmp_path, kind, where):
    folder = tmp_path / ("cifar-10-batches-bin" if kind == "binary" else "cifar-10-batches-py")
    folder.mkdir()
    batches = (write_cifar10_binary if kind == "binary" else write_cifar10_python)(folder)
    archive = tmp_path / "archives" / f"cifar-10-{kind}.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    path = {"folder": folder, "parent": tmp_path, "archive": archive, "folder of archive": archive.parent}[where]
    check_cifar10(read_cifar10(path), batches)


def test_cifar10_absent_or_broken(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no .*nowhere"):
        read_cifar10(tmp_path / "nowhere")
    write_cifar10_binary(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(ConfigError, match=r"has no data_batch_3\.bin; it should be"):
        read_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\0" * 3074)
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin: 3074 bytes are no whole number"):
        read_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x0b" * 3073)
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin: not CIFAR-10"):
        read_cifar10(tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="not a readable tar archive"):
        read_cifar10(tmp_path / "x.tar.gz")


def test_cifar10_archive_cannot_run_code(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    write_cifar10_python(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Exploit(), b"labels": []}, protocol=2))
    with pytest.raises(ConfigError, match=r"data_batch_2: not a batch .* refers to (io|_io|builtins|__builtin__).open"):
        read_cifar10(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_cifar10_image_size(tmp_path):
    write_cifar10_binary(tmp_path)
    with pytest.raises(ConfigError, match="--image-size: the images of CIFAR-10 are 32x32, got 64"):
        load(data=f"cifar10:{tmp_path}", image_size=64)


# --- folders of images


@pytest.fixture
def image_folder(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("cats", "dogs")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 128, (40, 60, 3), dtype=np.uint8) + np.uint8(127 * label)
                suffix, mode = (".png", "RGB") if i % 2 else (".jpg", "L")
                Image.fromarray(pixels).convert(mode).save(tmp_path / part / name / f"{i}{suffix}")
    return tmp_path


def folder_data(path, **settings):
    return load(data=f"imagefolder:{path}", image_size=24, batch_size=5, **settings)


def test_image_folder(image_folder):
    data = folder_data(image_folder)
    assert (data.classes, data.train_size, data.test_size) == (["cats", "dogs"], 20, 6)
    epoch = list(data.train_batches(1))
    assert [images.shape for images, _ in epoch] == [(5, 3, 24, 24)] * 4
    assert epoch[0][0].is_contiguous(memory_format=torch.channels_last)
    for images, labels in epoch:  # the classes differ in brightness
        assert torch.equal(images.mean((1, 2, 3)) > 0.5, labels == 1)
    assert equal(epoch, data.train_batches(1))
    assert equal(epoch[2:], data.train_batches(1, start=2))
    assert not torch.equal(epoch[0][0], next(data.train_batches(2))[0])
    assert torch.cat([labels for _, labels in data.test_batches()]).tolist() == [0, 0, 0, 1, 1, 1]


def test_image_folder_does_not_depend_on_workers(image_folder):
    alone, helped = folder_data(image_folder), folder_data(image_folder, workers=2)
    for epoch in (0, 1):
        assert equal(alone.train_batches(epoch), helped.train_batches(epoch))
    assert equal(alone.test_batches(), helped.test_batches())


def test_image_folder_without_split(image_folder):
    train, test, classes = scan_image_folder(image_folder / "train")
    assert classes == ["cats", "dogs"]
    assert (len(train), len(test)) == (18, 2)
    assert {label for _, label in test} == {0, 1}
    assert not set(train) & set(test)


def test_image_folder_problems(image_folder):
    with pytest.raises(ConfigError, match="there is no folder"):
        folder_data(image_folder / "nowhere")
    (image_folder / "val" / "birds").mkdir()
    with pytest.raises(ConfigError, match="val/ has classes that train/ lacks: birds"):
        folder_data(image_folder)
    (image_folder / "val" / "birds").rmdir()
    (image_folder / "train" / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no images in .*empty"):
        folder_data(image_folder)
    (image_folder / "train" / "empty").rmdir()
    for file in (image_folder / "train" / "cats").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"cats/\d+\.\w+: not readable as an image"):
        list(folder_data(image_folder).train_batches(0))
