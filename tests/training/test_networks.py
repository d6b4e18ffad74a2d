"""Networks by name, and their plain twins, which must be what PyTorch users write: no op of this package in them."""

import pytest
import torch

from fusedres.training.comparison import count_ops
from fusedres.training.config import ConfigError
from fusedres.training.networks import CIFAR, IMAGENET, build_model, plain_twin

SMALL = ("resnet20", "plain20", "preresnet110", "preresnet164", "resnet18", "resnet50")


@pytest.mark.parametrize("name", SMALL)
def test_twin_runs_plain_ops_and_gives_the_same_numbers(name):
    model = build_model(name, num_classes=7, in_channels=1)
    twin = plain_twin(model)
    size = 32 if name in IMAGENET else 8
    images, labels = torch.randn(4, 1, size, size), torch.arange(4)

    assert list(twin.state_dict()) == list(model.state_dict())
    assert not any(op.startswith("fusedres::") for op in count_ops(twin, images, labels))
    twin.load_state_dict(model.state_dict())
    for network in (model, twin):
        network.double().zero_grad()
        torch.nn.functional.cross_entropy(network(images.double()), labels).backward()
    for (key, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, plain.grad, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )
    for ours, plain in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, plain)


def test_twin_shares_nothing():
    model = build_model("resnet20", num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = plain_twin(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_names():
    with torch.device("meta"):
        for name in (*IMAGENET, *CIFAR):
            assert build_model(name, num_classes=3).fc.out_features == 3
    with pytest.raises(ConfigError, match="no network is called 'resnet19'; there are resnet18, "):
        build_model("resnet19", num_classes=10)
