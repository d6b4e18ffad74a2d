"""ConvBNAct2d against convolution, batch norm, addition and ReLU written out."""

import copy

import pytest
import torch
from torch import nn

from fusedres import ConvBNAct2d


class Eager(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.conv, self.bn, self.act = map(copy.deepcopy, (module.conv, module.bn, module.act))

    def forward(self, x, residual=None):
        y = self.bn(self.conv(x))
        y = y if residual is None else y + residual
        return y if self.act is None else self.act(y)


OPTIONS = [
    {},
    {"act": None},
    {"bias": True, "eps": 1e-3, "momentum": None},
    {"stride": 2, "padding": (0, 1), "padding_mode": "reflect"},
    {"groups": 3, "dilation": 2, "affine": False},
    {"padding": "same", "track_running_stats": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["no residual", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_eager(options, with_residual, training, backend, step, no_worse):
    torch.manual_seed(0)
    module = ConvBNAct2d(6, 9, 3, **options).train(training)
    for p in module.bn.parameters():
        nn.init.normal_(p, 0.5, 0.3)
    inputs = [torch.randn(3, 6, 11, 8)]
    if with_residual:
        inputs.append(torch.randn(module.conv(inputs[0]).shape))
    doubles = [t.double() for t in inputs]
    double = step(copy.deepcopy(module).double(), *doubles)
    reference = step(Eager(module).double(), *doubles)
    no_worse(step(copy.deepcopy(module), *inputs), step(Eager(module), *inputs), reference)
    for name in reference:
        torch.testing.assert_close(double[name], reference[name], rtol=1e-9, atol=1e-10)


def test_children_are_the_library_s_own():
    module = ConvBNAct2d(3, 8, (3, 1), stride=(2, 1), padding=(1, 0), dtype=torch.float64)
    assert type(module.conv) is nn.Conv2d
    assert isinstance(module.bn, nn.BatchNorm2d)
    assert list(module.state_dict()) == [
        "conv.weight",
        *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
    assert all(p.dtype == torch.float64 for p in module.parameters())
    assert (module.conv.kernel_size, module.conv.stride, module.conv.padding) == ((3, 1), (2, 1), (1, 0))
    assert type(module.act) is nn.ReLU
    assert ConvBNAct2d(3, 8, 3, act=None).act is None


def test_same_seed_same_weights_as_the_modules_written_out():
    torch.manual_seed(0)
    ours = ConvBNAct2d(3, 8, 3, bias=True)
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    assert torch.equal(ours.conv.weight, conv.weight)
    assert torch.equal(ours.conv.bias, conv.bias)
    assert torch.equal(ours.bn.weight, bn.weight)


def test_device_reaches_both_children():
    module = ConvBNAct2d(3, 8, 3, device="meta")
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}


def test_hooked_replaced_and_converted_children(step):
    torch.manual_seed(0)
    module = ConvBNAct2d(4, 5, 3).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    want = step(Eager(module), x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    assert type(converted.bn) is nn.SyncBatchNorm
    got = step(converted, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10)

    hooked = copy.deepcopy(module)
    hooked.bn.register_forward_hook(lambda _, args, out: out + 3)
    torch.testing.assert_close(hooked(x), torch.relu(copy.deepcopy(module).bn(module.conv(x)) + 3))

    module.bn = nn.Identity()
    torch.testing.assert_close(module(x), torch.relu(module.conv(x)))


@pytest.mark.parametrize("act", ["gelu", "ReLU", True, torch.relu])
def test_unknown_activation(act):
    with pytest.raises(ValueError, match='act must be "relu" or None, but got'):
        ConvBNAct2d(3, 8, 3, act=act)


def test_other_errors_are_those_of_the_convolution():
    with pytest.raises(ValueError, match="groups"):
        ConvBNAct2d(3, 8, 3, groups=2)
    with pytest.raises(TypeError):
        ConvBNAct2d(3, 8)
