"""What the demo measures with."""

import torch
from torch import nn

from fusedres.training.comparison import count_ops, saved_for_backward_bytes, threads_that_help


def small_network():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 64, 10))


IMAGES, LABELS = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])


def test_saved_bytes_are_what_autograd_keeps():
    relu_output, log_softmax, total_weight = 2 * 4 * 64 * 4, 2 * 10 * 4, 4
    assert saved_for_backward_bytes(small_network(), IMAGES, LABELS) == relu_output + log_softmax + total_weight


def test_saved_bytes_count_a_storage_once():
    class Twice(nn.Module):
        def forward(self, x):
            y = torch.exp(x)  # saved by exp, and by the product as both factors
            return (y * y.view_as(y)).flatten(1)

    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    softmax, total_weight = 2 * 64 * 4, 4
    assert saved_for_backward_bytes(Twice(), x, LABELS) == 2 * 64 * 4 + softmax + total_weight


def test_ops_of_a_step():
    assert count_ops(small_network(), IMAGES, LABELS) == {"aten::relu": 1, "aten::threshold_backward": 1}


def test_threads_that_help():
    torch.set_num_threads(1)
    assert threads_that_help(small_network(), IMAGES, LABELS) == 1
    torch.set_num_threads(2)
    assert threads_that_help(small_network(), IMAGES, LABELS) in (1, 2)
    assert torch.get_num_threads() == 2
