"""Images to train on, as batches that are a function of (seed, epoch, position) and of nothing else.

The order of an epoch comes from ``DistributedSampler``, the crop and flip of an image from (seed, epoch, index of the
image). So a run that is resumed in the middle of an epoch, or with another number of workers, sees the same pixels.

Images are kept as uint8 ``(N, H, W, C)``: batches come out channels_last without a copy.
"""

from __future__ import annotations

import io
import pickle
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .config import ConfigError, TrainConfig

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) normalised float32, labels (N,) int64

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))


class EpochOrder:
    """Which images make up each batch of an epoch on this rank; incomplete batches are left out."""

    def __init__(self, size: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size = batch_size
        self.sampler = DistributedSampler(range(size), world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.steps = len(self.sampler) // batch_size
        if self.steps == 0:
            share = f" for each of {world_size} processes" if world_size > 1 else ""
            raise ConfigError(
                f"--batch-size {batch_size} is more than the {len(self.sampler)} training images there are{share}"
            )

    def batches(self, epoch: int, start: int = 0) -> list[list[int]]:
        self.sampler.set_epoch(epoch)
        order = list(self.sampler)
        return [order[step * self.batch_size : (step + 1) * self.batch_size] for step in range(start, self.steps)]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _to_network(images: Tensor, mean: Tensor, std: Tensor, channels_last: bool) -> Tensor:
    """uint8 (N, H, W, C) to normalised float32 (N, C, H, W)."""
    x = images.to(torch.float32).sub_(mean).div_(std).permute(0, 3, 1, 2)
    # Not contiguous(): with one channel both formats are, and the strides would stay those of channels_last.
    return x if channels_last else x.clone(memory_format=torch.contiguous_format)


class ImageData:
    """Training and test images of one data set, in batches for one rank."""

    name: str
    classes: list[str]
    channels: int
    train_size: int
    test_size: int
    order: EpochOrder

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from number ``start``, augmented."""
        raise NotImplementedError

    def test_batches(self) -> Iterator[Batch]:
        """This rank's share of the test images, each image once over all ranks."""
        raise NotImplementedError


class TensorData(ImageData):
    """Images in memory, cropped at random from a padded copy and, where that makes sense, mirrored."""

    def __init__(
        self,
        name: str,
        train: tuple[Tensor, Tensor],  # uint8 (N, H, W, C), int64 (N,)
        test: tuple[Tensor, Tensor],
        classes: list[str],
        config: TrainConfig,
        *,
        pad: int,
        mirror: bool,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.name, self.classes = name, classes
        self.channels = train[0].shape[3]
        self.train_size, self.test_size = len(train[0]), len(test[0])
        self.order = EpochOrder(self.train_size, config.batch_size, seed=config.seed, rank=rank, world_size=world_size)
        self.seed, self.pad, self.mirror = config.seed, pad, mirror
        self.device = device
        self.channels_last = config.channels_last

        pixels = train[0].flatten(0, 2).to(torch.float32)
        self.mean = pixels.mean(0).to(device)  # (C,)
        self.std = pixels.std(0).clamp_min(1.0).to(device)
        self.images = F.pad(train[0], (0, 0, pad, pad, pad, pad)).to(device)
        self.labels = train[1].to(device)
        self.test_images = test[0][rank::world_size].to(device)
        self.test_labels = test[1][rank::world_size].to(device)
        self.test_batch_size = max(config.batch_size, 256)

    def _normalise(self, images: Tensor) -> Tensor:
        return _to_network(images, self.mean, self.std, self.channels_last)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        height, width = (size - 2 * self.pad for size in self.images.shape[1:3])
        draws = torch.rand(self.train_size, 3, generator=_generator(self.seed, epoch)).to(self.device)
        shift = (draws[:, :2] * (2 * self.pad + 1)).long()
        mirrored = draws[:, 2] < (0.5 if self.mirror else 0.0)
        rows, columns = torch.arange(height, device=self.device), torch.arange(width, device=self.device)
        for indices in self.order.batches(epoch, start):
            index = torch.tensor(indices, device=self.device)
            row = shift[index, 0, None] + rows  # (N, H)
            column = shift[index, 1, None] + torch.where(mirrored[index, None], columns.flip(0), columns)  # (N, W)
            images = self.images[index[:, None, None], row[:, :, None], column[:, None, :]]
            yield self._normalise(images), self.labels[index]

    def test_batches(self) -> Iterator[Batch]:
        batches = zip(
            self.test_images.split(self.test_batch_size), self.test_labels.split(self.test_batch_size), strict=True
        )
        for images, labels in batches:
            yield self._normalise(images), labels


def _digits(config: TrainConfig, **placement: Any) -> TensorData:
    """The 1,797 handwritten digits in scikit-learn, 8x8 pixels enlarged; every fifth of a class is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("--data digits needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=config.image_size, mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    rank_in_class = torch.zeros_like(labels)
    for label in range(10):
        of_class = labels == label
        rank_in_class[of_class] = torch.arange(int(of_class.sum()))
    test = rank_in_class % 5 == 4
    pad = max(1, config.image_size // 8)  # one pixel of the original
    train, held_out = (images[~test], labels[~test]), (images[test], labels[test])
    return TensorData(
        "digits", train, held_out, [str(i) for i in range(10)], config, pad=pad, mirror=False, **placement
    )


def _synthetic(config: TrainConfig, **placement: Any) -> TensorData:
    """Ten random patterns under noise: nothing to download, and something to learn."""
    try:
        count = int(config.data_argument or 1024)
    except ValueError:
        count = 0
    if count < 20:
        raise ConfigError(f"--data synthetic:IMAGES needs a number of at least 20, got {config.data_argument!r}")
    generator = torch.Generator().manual_seed(config.seed)
    size = config.image_size
    patterns = torch.rand(10, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)

    def draw(images: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(images) % 10
        noise = torch.randn(images, size, size, 3, generator=generator) * 0.2
        return ((patterns[labels] + noise).clamp(0, 1) * 255).to(torch.uint8), labels

    train, test = draw(count), draw(max(count // 4, 10))
    names = [f"pattern {i}" for i in range(10)]
    return TensorData("synthetic", train, test, names, config, pad=size // 8, mirror=False, **placement)


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_CIFAR10_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
_CIFAR10_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries of numpy arrays and refuses to call anything else: the archive is not ours."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric", "numpy.core.numeric")
        for name in ("_reconstruct", "_frombuffer", "scalar")
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _cifar10_member(name: str, content: bytes) -> tuple[Tensor, Tensor]:
    """One file of the binary or of the python version: uint8 (N, 32, 32, 3), int64 (N,)."""
    if name.endswith(".bin"):
        if not content or len(content) % 3073:
            raise ConfigError(f"{name}: {len(content)} bytes are no whole number of CIFAR-10 records of 3073")
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 3073)
        labels, pixels = records[:, 0].long(), records[:, 1:]
    else:
        try:
            batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
            labels = torch.tensor(batch[b"labels"], dtype=torch.int64)
            pixels = torch.from_numpy(batch[b"data"].copy())
        except Exception as error:
            raise ConfigError(f"{name}: not a batch of the CIFAR-10 python archive ({error})") from None
    if (
        pixels.dtype != torch.uint8
        or pixels.shape != (len(labels), 3072)
        or not (0 <= int(labels.min()) <= int(labels.max()) <= 9)
    ):
        raise ConfigError(f"{name}: not CIFAR-10 (3072 bytes an image, labels 0 to 9)")
    return pixels.view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous(), labels


def _cifar10_files(path: Path) -> dict[str, Callable[[], bytes]]:
    """Readers of the data files by base name, from a folder or an archive."""
    wanted = {name + suffix for name in (*_CIFAR10_TRAIN, "test_batch") for suffix in ("", ".bin")}
    if path.is_dir():
        folder = next((path / name for name in _CIFAR10_FOLDERS if (path / name).is_dir()), path)
        archive = next((p for p in sorted(path.glob("cifar-10-*.tar.gz"))), None)
        found = {p.name: p.read_bytes for p in folder.iterdir() if p.name in wanted}
        return found if found or archive is None else _cifar10_files(archive)
    if path.is_file():
        try:
            with tarfile.open(path) as archive:
                members = [
                    (Path(member.name).name, archive.extractfile(member)) for member in archive if member.isfile()
                ]
                contents = {name: file.read() for name, file in members if name in wanted and file is not None}
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ConfigError(f"{path}: not a readable tar archive ({error})") from None
        return {name: (lambda content=content: content) for name, content in contents.items()}
    raise ConfigError(f"--data cifar10: there is no {path}")


def read_cifar10(path: str | Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images from ``cifar-10-python.tar.gz``, ``cifar-10-binary.tar.gz``, or the folder of either."""
    path = Path(path).expanduser()
    files = _cifar10_files(path)
    suffix = ".bin" if "test_batch.bin" in files else ""
    missing = [name + suffix for name in (*_CIFAR10_TRAIN, "test_batch") if name + suffix not in files]
    if missing:
        raise ConfigError(
            f"--data cifar10: {path} has no {', '.join(missing)}; "
            "it should be cifar-10-python.tar.gz, cifar-10-binary.tar.gz or the folder unpacked from one"
        )
    train = [_cifar10_member(name + suffix, files[name + suffix]()) for name in _CIFAR10_TRAIN]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return (images, labels), _cifar10_member("test_batch" + suffix, files["test_batch" + suffix]())


def _cifar10(config: TrainConfig, **placement: Any) -> TensorData:
    if config.image_size != 32:
        raise ConfigError(f"--image-size: the images of CIFAR-10 are 32x32, got {config.image_size}")
    train, test = read_cifar10(config.data_argument)
    return TensorData("cifar10", train, test, CIFAR10_CLASSES, config, pad=4, mirror=True, **placement)


class FolderImages(Dataset):
    """Files and labels; an item is asked for by (epoch, index), and epoch ``None`` means without augmentation."""

    def __init__(self, samples: list[tuple[str, int]], image_size: int, seed: int) -> None:
        self.samples, self.image_size, self.seed = samples, image_size, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int]:
        from PIL import Image

        epoch, index = key
        path, label = self.samples[index]
        size = self.image_size
        try:
            with Image.open(path) as file:
                file.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded no larger than that needs
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as an image ({error})") from None
        width, height = image.size
        if epoch is None:  # the middle of the image, 7/8 of its short side
            side = 0.875 * min(width, height)
            left, top, crop_width, crop_height = (width - side) / 2, (height - side) / 2, side, side
            mirror = False
        else:  # a random part: 25 to 100 % of the area, sides 3:4 to 4:3 (https://arxiv.org/abs/1409.4842)
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 16_777_259 + index)
            area, ratio, x, y, flip = torch.rand(5, generator=generator).tolist()
            area = (0.25 + 0.75 * area) * width * height
            ratio = (3 / 4) ** (1 - 2 * ratio)
            crop_width, crop_height = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
            left, top = x * (width - crop_width), y * (height - crop_height)
            mirror = flip < 0.5
        box = (left, top, left + crop_width, top + crop_height)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3), label


class _Plan:
    """The batch sampler of a ``DataLoader`` whose workers live through all epochs."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int | None, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int | None, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one decides


class FolderData(ImageData):
    """Images in files, one folder for each class, decoded by worker processes."""

    def __init__(
        self,
        train: list[tuple[str, int]],
        test: list[tuple[str, int]],
        classes: list[str],
        config: TrainConfig,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.name, self.classes, self.channels = "imagefolder", classes, 3
        self.train_size, self.test_size = len(train), len(test)
        self.order = EpochOrder(len(train), config.batch_size, seed=config.seed, rank=rank, world_size=world_size)
        self.device = device
        self.channels_last = config.channels_last
        self.mean = torch.tensor(IMAGENET_MEAN, device=device) * 255
        self.std = torch.tensor(IMAGENET_STD, device=device) * 255

        self.plans = _Plan(), _Plan()
        mine = range(rank, len(test), world_size)
        self.plans[1].batches = [
            [(None, index) for index in mine[start : start + config.batch_size]]
            for start in range(0, len(mine), config.batch_size)
        ]
        self.loaders = [
            DataLoader(
                FolderImages(samples, config.image_size, config.seed),
                batch_sampler=plan,
                num_workers=config.workers,
                pin_memory=device.type == "cuda",
                persistent_workers=config.workers > 0,
                worker_init_fn=_ignore_interrupt,
            )
            for samples, plan in zip((train, test), self.plans, strict=True)
        ]

    def _batches(self, loader: DataLoader) -> Iterator[Batch]:
        for images, labels in loader:
            images = images.to(self.device, non_blocking=True)
            yield (
                _to_network(images, self.mean, self.std, self.channels_last),
                labels.to(self.device, non_blocking=True),
            )

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.plans[0].batches = [[(epoch, index) for index in batch] for batch in self.order.batches(epoch, start)]
        return self._batches(self.loaders[0])

    def test_batches(self) -> Iterator[Batch]:
        return self._batches(self.loaders[1])


def _class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _scan(root: Path, classes: list[str]) -> list[tuple[str, int]]:
    samples = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not files:
            raise ConfigError(f"--data imagefolder: no images in {root / name}")
        samples += [(str(file), label) for file in files]
    return samples


def scan_image_folder(path: str | Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[str]]:
    """Training files, test files and classes under ``path``.

    ``train/CLASS/*`` and ``val/CLASS/*`` (or ``test``), or ``CLASS/*`` alone, where every tenth image of a class, at
    least one, is held out for testing.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ConfigError(f"--data imagefolder: there is no folder {root}")
    folders = _class_folders(root)
    held_out = next((name for name in ("val", "valid", "test") if name in folders), None)
    if "train" in folders and held_out:
        classes = _class_folders(root / "train")
        unknown = set(_class_folders(root / held_out)) - set(classes)
        if unknown:
            raise ConfigError(
                f"--data imagefolder: {held_out}/ has classes that train/ lacks: {', '.join(sorted(unknown))}"
            )
        present = [name for name in classes if (root / held_out / name).is_dir()]
        test = [(file, classes.index(present[label])) for file, label in _scan(root / held_out, present)]
        train = _scan(root / "train", classes)
    else:
        root, classes = (root / "train", _class_folders(root / "train")) if folders == ["train"] else (root, folders)
        train, test = [], []
        by_class: dict[int, list[tuple[str, int]]] = {}
        for sample in _scan(root, classes):
            by_class.setdefault(sample[1], []).append(sample)
        for samples in by_class.values():
            held_out_samples = samples[9::10] or samples[-1:]
            test += held_out_samples
            train += [sample for sample in samples if sample not in held_out_samples]
    if len(classes) < 2:
        raise ConfigError(
            f"--data imagefolder: {root} needs at least two folders, one for each class, got {len(classes)}"
        )
    if not test:
        raise ConfigError(f"--data imagefolder: no images to test with under {root}")
    return train, test, classes


def _imagefolder(config: TrainConfig, **placement: Any) -> FolderData:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ConfigError("--data imagefolder needs Pillow: pip install pillow") from None
    return FolderData(*scan_image_folder(config.data_argument), config, **placement)


_READERS: dict[str, Callable[..., ImageData]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "imagefolder": _imagefolder,
    "synthetic": _synthetic,
}


def load_data(config: TrainConfig, *, device: torch.device, rank: int = 0, world_size: int = 1) -> ImageData:
    """The data set ``config.data`` names; :class:`ConfigError` says what is missing."""
    return _READERS[config.data_kind](config, device=device, rank=rank, world_size=world_size)
