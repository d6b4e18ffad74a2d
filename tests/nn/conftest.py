"""Comparison of a module with its eager twin, for the tests of this folder."""

import copy
import math

import pytest
import torch
from torch import nn

import fusedres
from fusedres.verification import ulp


class EagerTwin(nn.Module):
    """The published forward of a residual block, written out on the modules of a copy of it."""

    def __init__(self, block):
        super().__init__()
        self.block = copy.deepcopy(block)
        if isinstance(self.block.relu, nn.ReLU):
            self.block.relu.inplace = False

    def forward(self, x):
        b = self.block
        if isinstance(b, (fusedres.PreActBasicBlock, fusedres.PreActBottleneck)):
            a = b.relu(b.bn1(x))
            y = b.conv2(b.relu(b.bn2(b.conv1(a))))
            if isinstance(b, fusedres.PreActBottleneck):
                y = b.conv3(b.relu(b.bn3(y)))
            return y + (x if b.downsample is None else b.downsample(a))
        y = b.bn2(b.conv2(b.relu(b.bn1(b.conv1(x)))))
        if isinstance(b, fusedres.Bottleneck):
            y = b.bn3(b.conv3(b.relu(y)))
        y = y + (x if b.downsample is None else b.downsample(x))
        return b.relu(y)


def train_step(module, x, *extra):
    """Everything one forward and backward leave behind: output, input gradients, parameter gradients, buffers."""
    block = module.block if isinstance(module, EagerTwin) else module
    inputs = [t.detach().clone().requires_grad_() for t in (x, *extra)]
    y = module(*inputs)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, [*inputs, *block.parameters()], dy)
    names = ["dx", "dresidual"][: len(inputs)] + [f"grad of {name}" for name, _ in block.named_parameters()]
    return {"output": y.detach(), **dict(zip(names, grads, strict=True)), **dict(block.named_buffers())}


def assert_no_worse(ours, eager, reference):
    """The rule for every number: at most twice eager's own distance from float64, and a few ulp."""
    assert ours.keys() == eager.keys() == reference.keys()
    for name, want in reference.items():
        if not want.is_floating_point():
            assert torch.equal(ours[name], want), name
            continue
        assert ours[name].dtype == eager[name].dtype, name
        error = (ours[name].double() - want.double()).abs().max()
        bound = 2 * (eager[name].double() - want.double()).abs().max()
        tiny = 2 * torch.finfo(ours[name].dtype).eps * want.abs().max()
        assert error <= bound + tiny, (
            f"{name}: {error:.3e} from float64, eager {bound / 2:.3e}, allowed {bound + tiny:.3e}"
        )


class Worst:
    """The rule over several draws, in ulp of each quantity: of few values, how exact eager is depends on luck.

    A tensor of a draw that breaks the rule is judged by the worst of all draws, ours and eager's.
    """

    def __init__(self):
        self.ours, self.eager = {}, {}

    def add(self, ours, eager, exact, rounded_to=None):
        """``exact(step)`` is float64's step with the masks of another; ``rounded_to``: see :func:`judge_draws`."""
        assert ours.keys() == eager.keys()
        for name in ours:
            assert ours[name].dtype == eager[name].dtype, name
            assert ours[name].shape == eager[name].shape, name
        for worst, own in ((self.ours, ours), (self.eager, eager)):
            for name, want in exact(own).items():
                if not want.is_floating_point():
                    assert torch.equal(own[name], want), name
                    continue
                dtype = rounded_to if rounded_to and "running" not in name else own[name].dtype
                largest = want.abs().max().item()
                tiny = 1e-10 * largest if dtype is torch.float64 else ulp(dtype, largest)
                error = (own[name].double() - want).abs().max().item() / tiny
                worst[name] = max(worst.get(name, 0.0), math.inf if math.isnan(error) else error)

    def failures(self):
        return [
            f"{name}: {error:.3g} ulp from float64, eager {self.eager[name]:.3g}"
            for name, error in self.ours.items()
            if error > 2 * self.eager[name] + 1
        ]


def judge_draws(measure, draws=4, rounded_to=None):
    """The rule of what ``measure(seed)`` gives, as ``Worst.add`` takes it.

    Args:
        rounded_to: the dtype that gradients go through on their way, under autocast.
    """
    worst = Worst()
    worst.add(*measure(0), rounded_to)
    if worst.failures():
        for seed in range(1, draws):
            worst.add(*measure(seed), rounded_to)
    assert not worst.failures()


class PinnedReLU(nn.Module):
    """ReLU, in its last call by another's mask: where a pre-activation is within rounding of zero either is right."""

    def __init__(self, calls, output):
        super().__init__()
        self.left, self.mask = calls, ~(output <= 0)

    def forward(self, z):
        self.left -= 1
        return torch.relu(z) if self.left else z * self.mask


def part_from_zero(block, x):
    """Moves the shifts of a block's inner norms so that what each ReLU reads has a gap at zero; how wide, to a side.

    So rounding decides no mask that nobody can see.
    """
    exact, margins, y = copy.deepcopy(block).double(), [], x.double()
    norms = [name for name, m in block.named_children() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for i, name in enumerate(norms[:-1]):
            norm = exact.get_submodule(name)
            z = norm(exact.get_submodule(f"conv{i + 1}")(y))
            values = z.transpose(0, 1).flatten(1).sort(1).values
            few = values.size(1) // 10
            values = values[:, few : values.size(1) - few]
            width, at = values.diff(dim=1).max(1)
            own = block.get_submodule(name).bias
            own.copy_(norm.bias - values.gather(1, at[:, None])[:, 0] - width / 2)
            z = z + (own - norm.bias).view(1, -1, 1, 1)
            margins.append(z.abs().min().item())
            y = z.relu()
    return min(margins)


@pytest.fixture
def judge():
    return judge_draws


@pytest.fixture
def exact_step():
    """A function that runs a block's training step in float64, with the last mask that another step used."""

    def run(block, x, of):
        twin = EagerTwin(block).double()
        calls = sum(isinstance(m, nn.BatchNorm2d) for m in twin.block.children())
        twin.block.relu = PinnedReLU(calls, of["output"])
        return train_step(twin, x.double())

    return run


@pytest.fixture
def parted():
    return part_from_zero


@pytest.fixture
def saved_storages():
    """A function that runs ``forward()`` and returns its output and the storages kept for backward: address to bytes.

    Without parameters; with what the nodes of Python functions hold beside them.
    """

    def measure(forward, module):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = forward()
        for t in tensors_of(vars(out.grad_fn) if hasattr(out.grad_fn, "__dict__") else ()):
            pack(t)
        for t in (*module.parameters(), *module.buffers()):
            storages.pop(t.untyped_storage().data_ptr(), None)
        return out, storages

    return measure


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_of(entry)


@pytest.fixture
def eager_twin():
    return EagerTwin


@pytest.fixture
def step():
    return train_step


@pytest.fixture
def no_worse():
    return assert_no_worse


def _cpu_served() -> bool:
    return fusedres.info()["libraries"]["_ops_cpu"]["loaded"]


@pytest.fixture(params=["auto", "reference", "cpu"])
def backend(request):
    """Each way the ops are served on a CPU."""
    if request.param == "cpu" and not _cpu_served():
        pytest.skip("the CPU library is not loaded")
    with fusedres.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["auto", "reference"])
def served(request):
    """What serves by default, and the specification."""
    with fusedres.use_backend(request.param):
        yield request.param
