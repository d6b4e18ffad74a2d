"""Against torchvision itself, where it is installed."""

import copy
import importlib

import pytest
import torch

import fusedres
from fusedres import models


def import_torchvision():
    """torchvision, also where its own library was built for another torch and left its operators undefined."""
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision")


@pytest.fixture(scope="module")
def torchvision():
    return import_torchvision()


NAMES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_load_both_ways(name, torchvision):
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), getattr(torchvision.models, name)()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"num_classes": 10, "zero_init_residual": True}),
        ("resnext50_32x4d", {"replace_stride_with_dilation": [False, True, True]}),
    ],
)
def test_same_seed_same_weights(name, kwargs, torchvision):
    torch.manual_seed(0)
    ours = getattr(models, name)(**kwargs)
    rng_state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(**kwargs)
    for key, t in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], t), key
    assert torch.equal(rng_state, torch.get_rng_state())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("block", "layers"), [("BasicBlock", [1, 2, 1, 1]), ("Bottleneck", [1, 2, 1, 1])])
def test_torchvision_s_resnet_with_our_blocks(block, layers, training, torchvision, step, same):
    theirs = torchvision.models.ResNet(getattr(torchvision.models.resnet, block), layers, num_classes=10).double()
    hybrid = torchvision.models.ResNet(getattr(fusedres, block), layers, num_classes=10).double()
    ours = models.ResNet(getattr(fusedres, block), layers, num_classes=10).double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    state_dict = copy.deepcopy(theirs.state_dict())
    want = step(theirs.train(training), x)
    for model in (hybrid, ours):
        model.load_state_dict(state_dict, strict=True)
        got = step(model.train(training), x)
        assert list(got) == list(want)
        same(got, want)


@pytest.mark.parametrize(
    ("block", "kwargs"),
    [
        ("BasicBlock", {"groups": 2}),
        ("BasicBlock", {"base_width": 128}),
        ("BasicBlock", {"dilation": 2}),
        ("BasicBlock", {"groups": 2, "dilation": 2}),
    ],
)
def test_same_errors(block, kwargs, torchvision):
    with pytest.raises((ValueError, NotImplementedError)) as theirs:
        getattr(torchvision.models.resnet, block)(8, 8, **kwargs)
    with pytest.raises(theirs.type) as ours:
        getattr(fusedres, block)(8, 8, **kwargs)
    assert str(ours.value).startswith(str(theirs.value))


def test_frozen_batch_norm(torchvision, step, same):
    from torchvision.ops.misc import FrozenBatchNorm2d

    theirs = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d, num_classes=10).double()
    ours = models.resnet18(norm_layer=FrozenBatchNorm2d, num_classes=10).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    same(step(ours, x), step(theirs, x))


def test_zero_init_residual_reaches_torchvision_s_blocks(torchvision):
    torch.manual_seed(0)
    ours = fusedres.zero_init_residual(torchvision.models.resnet18())
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(zero_init_residual=True)
    assert all(torch.equal(t, theirs.state_dict()[key]) for key, t in ours.state_dict().items())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_feature_extraction(training, torchvision, step, same):
    from torchvision.models.feature_extraction import create_feature_extractor

    theirs = torchvision.models.resnet18().double()
    ours = models.resnet18().double()
    ours.load_state_dict(theirs.state_dict())
    nodes = ["maxpool", "layer1.0.relu", "layer2.0.conv2", "layer2.0.downsample.1", "layer3", "layer4.1.relu_1"]
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    results = []
    for model in (theirs, ours):
        features = create_feature_extractor(model, nodes).train(training)(x)
        loss = sum(f.square().mean() for f in features.values())
        parameters = [p for name, p in model.named_parameters() if not name.startswith("fc")]
        results.append([*features.values(), *torch.autograd.grad(loss, parameters)])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
