"""zero_init_residual."""

import pytest
import torch
from torch import nn

import fusedres
from fusedres import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck

LAST = {BasicBlock: "bn2", Bottleneck: "bn3", PreActBasicBlock: "conv2", PreActBottleneck: "conv3"}


@pytest.mark.parametrize(("cls", "last"), LAST.items())
def test_every_block_starts_as_its_shortcut(cls, last):
    torch.manual_seed(0)
    channels = 4 * cls.expansion
    model = nn.Sequential(cls(channels, 4), nn.Sequential(cls(channels, 4)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert fusedres.zero_init_residual(model) is model
    for name, t in model.state_dict().items():
        if name.endswith(f"{last}.weight"):
            assert not t.any(), name
        else:
            assert torch.equal(t, before[name]), name

    x = torch.randn(2, channels, 6, 6)
    preact = cls in (PreActBasicBlock, PreActBottleneck)
    torch.testing.assert_close(model(x), x if preact else torch.relu(x), rtol=0, atol=0)


@pytest.mark.parametrize(("cls", "last"), LAST.items())
def test_the_zeroed_weight_gets_a_gradient(cls, last):
    torch.manual_seed(0)
    model = fusedres.zero_init_residual(cls(4 * cls.expansion, 4))
    model(torch.randn(2, 4 * cls.expansion, 6, 6)).square().sum().backward()
    assert model.get_submodule(last).weight.grad.abs().min() > 0


def test_subclasses_and_norms_without_weight():
    class Custom(Bottleneck):
        pass

    model = fusedres.zero_init_residual(Custom(16, 4))
    assert not model.bn3.weight.any()
    fusedres.zero_init_residual(BasicBlock(4, 4, norm_layer=nn.Identity))
    fusedres.zero_init_residual(BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False)))


def test_other_modules_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fusedres.zero_init_residual(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
