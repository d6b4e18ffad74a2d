"""The ImageNet family: torchvision's keys and parameter counts, and the forward written out in eager PyTorch."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fusedres
from fusedres import models

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
STORED = json.loads((Path(__file__).parent / "data" / "torchvision_resnet_keys.json").read_text())


def small_resnet(block=fusedres.BasicBlock, **kwargs):
    torch.manual_seed(0)
    return models.ResNet(block, (1, 1, 1, 1), num_classes=5, **kwargs)


def eager_forward(model, x):
    """The forward of torchvision's ResNet on the modules of ours."""

    def block_forward(b, x):
        y = b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(x)))))
        if hasattr(b, "bn3"):
            y = b.bn3(b.conv3(torch.relu(y)))
        return torch.relu(y + (x if b.downsample is None else b.downsample(x)))

    x = model.maxpool(torch.relu(model.bn1(model.conv1(x))))
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            x = block_forward(block, x)
    return model.fc(model.avgpool(x).flatten(1))


class EagerTwin(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, x):
        return eager_forward(self.model, x)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters_and_keys_are_torchvision_s(name, count):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert sum(p.numel() for p in model.parameters()) == count
    lines = [f"{key} {'x'.join(map(str, t.shape))}".rstrip() for key, t in model.state_dict().items()]
    if name in STORED["keys"]:
        assert lines == STORED["keys"][name]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == STORED["sha256"][name]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("block", [fusedres.BasicBlock, fusedres.Bottleneck])
def test_equals_eager(block, training, memory_format, step, same):
    model = small_resnet(block).double().to(memory_format=memory_format).train(training)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64).to(memory_format=memory_format)
    twin, other = EagerTwin(model), copy.deepcopy(model)
    want = step(twin, x)
    same(step(model, x), want)
    with fusedres.use_backend("reference"):
        same(step(other, x), want)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("resnet18", {"batch_norm_act_max_pool": 1, "batch_norm_act": 13, "batch_norm_add_batch_norm_act": 3}),
        ("resnet50", {"batch_norm_act_max_pool": 1, "batch_norm_act": 44, "batch_norm_add_batch_norm_act": 4}),
    ],
)
def test_every_norm_is_in_a_fused_op(name, want, fused_ops):
    model = getattr(models, name)(num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    with fusedres.use_backend("reference"):
        with fused_ops() as forward:
            y = model(x)
        with fused_ops() as backward:
            y.sum().backward()
    assert forward.counts == want
    assert backward.counts == {f"{op}_backward": n for op, n in want.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "maxpool", nn.Identity()),
        lambda m: setattr(m, "maxpool", nn.AvgPool2d(2)),
        lambda m: setattr(m, "maxpool", nn.MaxPool2d((2, 3), 1, (1, 0), dilation=2, ceil_mode=True)),
        lambda m: m.maxpool.register_forward_hook(lambda _, args, out: out * 2),
        lambda m: m.bn1.register_forward_hook(lambda _, args, out: out + 1),
        lambda m: setattr(m, "bn1", nn.GroupNorm(4, 64)),
    ],
    ids=["Identity pool", "AvgPool2d", "other window", "hook on the pool", "hook on the norm", "GroupNorm"],
)
def test_changed_stem(change, step, same):
    model = small_resnet()
    change(model)
    model = model.double()
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    want = step(EagerTwin(model), x)
    same(step(model, x), want)


def test_relu_hook_fires_in_the_stem():
    model = small_resnet()
    seen = []
    model.relu.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    model(torch.randn(2, 3, 32, 32))
    assert seen == [(2, 64, 16, 16)]


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 128, 128)])
def test_an_image_without_batch_is_refused_as_by_torchvision(size):
    with pytest.raises(ValueError, match="4D"):
        small_resnet()(torch.randn(size))


def test_constructor_arguments():
    model = models.resnet50(
        num_classes=7,
        replace_stride_with_dilation=[False, True, True],
        norm_layer=lambda c: nn.GroupNorm(4, c),
        in_channels=1,
    ).eval()
    assert [model.layer3[0].conv2.dilation, model.layer3[1].conv2.dilation] == [(1, 1), (2, 2)]
    assert [model.layer4[0].conv2.dilation, model.layer4[1].conv2.dilation] == [(2, 2), (4, 4)]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = torch.randn(1, 1, 40, 40)
    features = nn.Sequential(*list(model.children())[:-2])(x)
    assert features.shape == (1, 2048, 5, 5)  # 40 / 8: the last two strides are dilations
    torch.testing.assert_close(model(x), model.fc(features.mean((2, 3))))


def test_zero_init_residual():
    torch.manual_seed(0)
    model = models.resnet18(zero_init_residual=True)
    torch.manual_seed(0)
    plain = fusedres.zero_init_residual(models.resnet18())
    for (name, t), want in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(t, want), name
        if name.endswith("bn2.weight"):
            assert not t.any(), name


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "replace_stride_with_dilation", {"replace_stride_with_dilation": [True]}),
        (ValueError, "groups=1 and base_width=64", {"groups": 2}),
        (ValueError, "groups=1 and base_width=64", {"width_per_group": 128}),
        (NotImplementedError, "Dilation > 1", {"replace_stride_with_dilation": [False, False, True]}),
    ],
)
def test_constructor_errors(error, match, kwargs):
    with torch.device("meta"), pytest.raises(error, match=match):
        models.ResNet(fusedres.BasicBlock, (1, 1, 1, 2), **kwargs)


def test_symbolic_trace_follows_train_and_eval(step, same):
    model = small_resnet().double()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for mode in (True, False):
        want, got = step(model.train(mode), x), step(traced.train(mode), x)
        same({name: got[name] for name in want}, want)


def test_deepcopy_trains_alone(step, same):
    model = small_resnet().double()
    other = copy.deepcopy(model)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    want = step(EagerTwin(model), x)
    same(step(other, x), want)
    assert model.bn1.num_batches_tracked == 0
