"""Residual blocks against the same block written out in eager PyTorch."""

import copy
import io
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from torch import fx, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck

BLOCKS = [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck]
POST_ACT = [BasicBlock, Bottleneck]


def make_block(cls, shortcut="identity", *, planes=7, inplanes=5, seed=0, norm_layer=None, **kwargs):
    """A block with odd channel counts and statistics, scales and shifts that are not those of initialisation."""
    torch.manual_seed(seed)
    outplanes = planes * cls.expansion
    norm = norm_layer or nn.BatchNorm2d
    if shortcut == "identity":
        block = cls(outplanes, planes, norm_layer=norm_layer, **kwargs)
    else:
        layers = [nn.Conv2d(inplanes, outplanes, 1, 2, bias=False), norm(outplanes)]
        downsample = nn.Sequential(*layers) if shortcut == "projection" else nn.Sequential(nn.AvgPool2d(1), *layers)
        block = cls(inplanes, planes, 2, downsample, norm_layer=norm_layer, **kwargs)
    randomise_norms(block)
    return block


def randomise_norms(module):
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            if m.affine:
                nn.init.normal_(m.weight, 1, 0.3)
                nn.init.normal_(m.bias, 0, 0.3)
            if m.track_running_stats:
                nn.init.normal_(m.running_mean, 0, 0.3)
                nn.init.uniform_(m.running_var, 0.5, 2)


def make_input(block, eager_twin, *, channels_last=False, seed=0, batch=3):
    """An input for which no pre-activation is within rounding of zero, where either side would be right."""
    channels = (block.bn1 if isinstance(block, (PreActBasicBlock, PreActBottleneck)) else block.conv1).weight
    channels = channels.shape[1] if channels.dim() == 4 else channels.shape[0]
    for attempt in range(20):
        generator = torch.Generator().manual_seed(100 * seed + attempt)
        x = torch.randn(batch, channels, 9, 6, generator=generator)
        twin = eager_twin(block).double()
        margin = []
        twin.block.relu.register_forward_pre_hook(lambda _, args: margin.append(args[0].abs().min().item()))  # noqa: B023
        twin(x.double())
        if min(margin) > 3e-5:
            return x.to(memory_format=torch.channels_last) if channels_last else x
    raise AssertionError("no input with a margin found")


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shortcut", ["identity", "projection", "pooled projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_equals_eager(cls, shortcut, training, channels_last, backend, eager_twin, step, no_worse):
    block = make_block(cls, shortcut).train(training)
    x = make_input(block, eager_twin, channels_last=channels_last)
    if channels_last:
        block = block.to(memory_format=torch.channels_last)
    reference = step(eager_twin(block).double(), x.double())
    eager = step(eager_twin(block), x)
    double = step(copy.deepcopy(block).double(), x.double())
    ours = step(block, x)
    no_worse(ours, eager, reference)
    assert ours["output"].stride() == eager["output"].stride()
    for name, want in reference.items():
        torch.testing.assert_close(double[name], want, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_one_sgd_step_equals_eager(cls, shortcut, eager_twin):
    block = make_block(cls, shortcut).double()
    twin = eager_twin(block)
    x = make_input(block, eager_twin).double()
    for module in (block, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for (name, ours), want in zip(block.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_bfloat16_autocast_and_modules(cls, shortcut, backend, eager_twin):
    block = make_block(cls, shortcut)
    x = make_input(block, eager_twin)
    reference = eager_twin(block).double()(x.double())

    def assert_close_as_eager(y, want):
        assert y.dtype == want.dtype
        error, bound = ((t.double() - reference).abs().max() for t in (y, want))
        assert error <= 2 * bound
        y.float().sum().backward()

    eager = eager_twin(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = block(x), eager(x)
    assert_close_as_eager(y, want)
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())
    block = make_block(cls, shortcut).bfloat16()
    assert_close_as_eager(block(x.bfloat16()), eager_twin(block)(x.bfloat16()))
    assert all(p.grad.dtype == torch.bfloat16 for p in block.parameters())


class OpCounter(TorchDispatchMode):
    """Counts the ops that reach the dispatcher, ours under their family's name whichever backend serves them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        for suffix in ("_reference", "_cpu"):
            name = name.removesuffix(suffix)
        self.counts[f"{namespace}::{name}"] += 1
        return func(*args, **(kwargs or {}))

    def fused(self):
        return {name.removeprefix("fusedres::"): n for name, n in self.counts.items() if name.startswith("fusedres::")}


@pytest.mark.parametrize(
    ("cls", "shortcut", "want"),
    [
        (BasicBlock, "identity", {"batch_norm_act": 2}),
        (BasicBlock, "projection", {"batch_norm_act": 1, "batch_norm_add_batch_norm_act": 1}),
        (Bottleneck, "identity", {"batch_norm_act": 3}),
        (Bottleneck, "projection", {"batch_norm_act": 2, "batch_norm_add_batch_norm_act": 1}),
        (PreActBasicBlock, "identity", {"batch_norm_act": 2}),
        (PreActBottleneck, "identity", {"batch_norm_act": 3}),
    ],
)
def test_every_norm_add_relu_is_one_op(cls, shortcut, want, backend):
    if backend == "auto" and not fusedres.info()["libraries"]["_ops_cpu"]["loaded"]:
        pytest.skip("the CPU library is not loaded")
    block = make_block(cls, shortcut)
    size = 64 if backend == "auto" else 8  # eager's kernels serve small tensors
    x = torch.randn(4, block.conv1.in_channels, size, size, requires_grad=True)
    with OpCounter() as forward:
        y = block(x)
    with OpCounter() as backward:
        y.sum().backward()
    assert forward.fused() == want
    assert backward.fused() == {f"{name}_backward": n for name, n in want.items()}
    eager = {"native_batch_norm", "native_batch_norm_backward", "relu", "relu_", "threshold_backward", "clamp_min"}
    assert not eager & {name.removeprefix("aten::") for name in forward.counts | backward.counts}
    if cls in POST_ACT:
        assert not {"aten::add", "aten::add_"} & forward.counts.keys()


def batch_norm_without_statistics(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision.ops.misc: four buffers and an affine map."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.5), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 0.7)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


NORM_LAYERS = {
    "momentum None": partial(nn.BatchNorm2d, momentum=None),
    "large eps": partial(nn.BatchNorm2d, eps=0.5, momentum=0.7),
    "not affine": partial(nn.BatchNorm2d, affine=False),
    "no running statistics": batch_norm_without_statistics,
    "BatchNormAct2d": fusedres.BatchNormAct2d,
    "BatchNormAct2d without act": partial(fusedres.BatchNormAct2d, act=None),
    "GroupNorm": partial(nn.GroupNorm, 1),
    "InstanceNorm2d": nn.InstanceNorm2d,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "Identity": nn.Identity,
}


@pytest.mark.parametrize("norm_layer", NORM_LAYERS.values(), ids=NORM_LAYERS.keys())
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_any_norm_layer(cls, shortcut, norm_layer, eager_twin, step):
    block = make_block(cls, shortcut, norm_layer=norm_layer).double()
    generator = torch.Generator().manual_seed(0)
    conv = block.conv1
    channels = conv.in_channels
    x = torch.randn(3, channels, 9, 6, generator=generator, dtype=torch.float64)
    twin = eager_twin(block)
    for _ in range(2):  # twice, for the cumulative average
        ours, want = step(block, x), step(twin, x)
        assert ours.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(
                ours[name], want[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("cls", BLOCKS)
def test_convert_sync_batchnorm_loses_nothing(cls, step):
    block = make_block(cls, "projection").double()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert type(converted.bn1) is type(converted.downsample[1]) is nn.SyncBatchNorm
    x = torch.randn(3, block.conv1.in_channels, 9, 6, dtype=torch.float64)
    want, got = step(block, x), step(converted, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10)


def last_norm(block):
    return {BasicBlock: "bn2", Bottleneck: "bn3", PreActBasicBlock: "bn2", PreActBottleneck: "bn3"}[type(block)]


def hook_targets(cls):
    targets = ["relu", "bn1", "last norm", "conv1", "downsample", "downsample.0", "downsample.1"]
    return [(cls, target) for target in targets]


def target_module(block, target):
    return block.get_submodule(last_norm(block) if target == "last norm" else target)


@pytest.mark.parametrize(("cls", "target"), [pair for cls in BLOCKS for pair in hook_targets(cls)])
def test_forward_hooks_fire_and_may_replace_the_output(cls, target, eager_twin, step):
    block = make_block(cls, "projection").double()
    x = torch.randn(3, block.conv1.in_channels, 9, 6, dtype=torch.float64)
    block(x)  # hooks are registered after the first call
    twin = eager_twin(block)
    results, calls = [], []
    for module, inner in ((block, block), (twin, twin.block)):
        seen = []
        hooked = target_module(inner, target)
        hooked.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach().clone()))
        hooked.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.detach().clone()) or out * 0.5)
        results.append(step(module, x))
        calls.append(seen)
    ours, want = results
    assert len(calls[0]) == len(calls[1]) > 0
    for got, expected in zip(*calls, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    for name in want:
        torch.testing.assert_close(ours[name], want[name], rtol=1e-9, atol=1e-10)


def test_a_removed_hook_leaves_the_block_fused():
    block = make_block(Bottleneck, "projection")
    x = torch.randn(2, 5, 8, 8)
    handle = block.relu.register_forward_hook(lambda *args: None)
    with fusedres.use_backend("reference"), OpCounter() as hooked:
        block(x)
    assert not hooked.fused()
    handle.remove()
    with fusedres.use_backend("reference"), OpCounter() as counter:
        block(x)
    assert counter.fused() == {"batch_norm_act": 2, "batch_norm_add_batch_norm_act": 1}


@pytest.mark.parametrize("cls", BLOCKS)
def test_global_hooks_see_every_module(cls, eager_twin):
    block = make_block(cls, "projection")
    twin = eager_twin(block)
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    names = []
    for module, inner in ((block, block), (twin, twin.block)):
        name_of = {m: name for name, m in inner.named_modules()}
        seen = Counter()
        handle = module_hooks.register_module_forward_hook(
            lambda m, args, out, seen=seen, name_of=name_of: seen.update([name_of.get(m, "twin")])
        )
        try:
            module(x)
        finally:
            handle.remove()
        seen.pop("twin", None)
        seen.pop("", None)
        names.append(seen)
    assert names[0] == names[1]
    assert names[0]["relu"] == sum(name.startswith("bn") for name, _ in block.named_children())


@pytest.mark.parametrize("cls", BLOCKS)
def test_backward_hooks_fire(cls):
    block = make_block(cls, "projection")
    block.relu.inplace = False  # in place, eager refuses a backward hook on the norm before it
    fired = []
    for name in ("bn1", last_norm(block), "downsample.1"):
        block.get_submodule(name).register_full_backward_hook(lambda *args, name=name: fired.append(name))
    x = torch.randn(2, block.conv1.in_channels, 8, 8, requires_grad=True)
    block(x).sum().backward()
    assert sorted(fired) == sorted(["bn1", last_norm(block), "downsample.1"])


@pytest.mark.parametrize("act", [nn.SiLU(), nn.ReLU6(), nn.Identity(), nn.LeakyReLU(0.1, inplace=True)], ids=repr)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_a_swapped_activation_is_used(cls, shortcut, act, eager_twin, step):
    block = make_block(cls, shortcut).double()
    block.relu = act
    x = torch.randn(3, block.conv1.in_channels, 9, 6, dtype=torch.float64)
    want, got = step(eager_twin(block), x), step(block, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cls", BLOCKS)
def test_parametrized_norm_and_patched_forward(cls, eager_twin, step):
    block = make_block(cls, "projection").double()
    torch.nn.utils.parametrize.register_parametrization(block.bn1, "weight", nn.Softplus())
    parametrizations.weight_norm(block.conv1)
    x = torch.randn(3, block.conv1.in_channels, 9, 6, dtype=torch.float64)
    want, got = step(eager_twin(block), x), step(block, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10)

    patched = make_block(cls, "projection").double()
    plain = patched(x)
    patched.relu.forward = lambda t: torch.zeros_like(t)
    assert not torch.equal(patched(x), plain)


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_mixed_train_and_eval_norms(cls, shortcut, eager_twin, step):
    block = make_block(cls, shortcut).double()
    block.get_submodule(last_norm(block)).eval()
    if shortcut == "projection":
        block.downsample[1].momentum = None
        block.downsample[1].eps = 0.1
    x = torch.randn(3, block.conv1.in_channels, 9, 6, dtype=torch.float64)
    want, got = step(eager_twin(block), x), step(block, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_symbolic_trace_keeps_modules_and_gradients(cls, shortcut, training, step):
    block = make_block(cls, shortcut).double().train(training)
    traced = fx.symbolic_trace(copy.deepcopy(block))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called.count("relu") == sum(name.startswith("bn") for name, _ in block.named_children())
    assert ("downsample.1" in called) == (shortcut == "projection")
    x = torch.randn(3, block.conv1.in_channels, 9, 6, dtype=torch.float64)
    want, got = step(block, x), step(traced, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_compile_fullgraph(cls, shortcut, step):
    torch._dynamo.reset()
    block = make_block(cls, shortcut)
    # Large enough for the native ops in eager mode too, where small batch norms are left to ATen.
    x = torch.randn(8, block.conv1.in_channels, 32, 32)
    want = step(copy.deepcopy(block), x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x_ = x.clone().requires_grad_()
    y = compiled(x_)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    torch.testing.assert_close(y, want["output"])
    torch.testing.assert_close(x_.grad, want["dx"])
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, want[f"grad of {name}"])
    for name, b in block.named_buffers():
        torch.testing.assert_close(b, want[name])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_export(cls, training):
    block = make_block(cls, "projection").train(training)
    x = torch.randn(3, block.conv1.in_channels, 9, 6)
    program = torch.export.export(copy.deepcopy(block), (x,))
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("cls", BLOCKS)
def test_deepcopy_pickle_and_save(cls, step):
    block = make_block(cls, "projection")
    x = torch.randn(3, block.conv1.in_channels, 9, 6)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)]
    want = step(block, x)
    for other in copies:
        got = step(other, x)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("cls", [BasicBlock, PreActBasicBlock])
def test_basic_block_errors(cls):
    for kwargs in ({"groups": 2}, {"base_width": 128}, {"groups": 2, "dilation": 2}):
        with pytest.raises(ValueError, match=f"{cls.__name__} only supports groups=1 and base_width=64, got groups="):
            cls(8, 8, **kwargs)
    with pytest.raises(NotImplementedError, match=f"Dilation > 1 not supported in {cls.__name__}, got dilation=2"):
        cls(8, 8, dilation=2)


@pytest.mark.parametrize("cls", [Bottleneck, PreActBottleneck])
def test_bottleneck_groups_width_and_dilation(cls, eager_twin, step):
    block = cls(32, 8, groups=4, base_width=32, dilation=2).double()
    assert block.conv2.weight.shape == (16, 4, 3, 3)  # int(8 * 32 / 64) * 4 channels in 4 groups
    assert (block.conv2.dilation, block.conv2.padding, block.conv2.groups) == ((2, 2), (2, 2), 4)
    x = torch.randn(2, 32, 7, 7, dtype=torch.float64)
    want, got = step(eager_twin(block), x), step(block, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("cls", BLOCKS)
def test_empty_batch(cls, shortcut, backend, eager_twin, step):
    block = make_block(cls, shortcut)
    x = torch.randn(0, block.conv1.in_channels, 9, 6)
    want, got = step(eager_twin(block), x), step(block, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cls", BLOCKS)
def test_one_value_per_channel_is_refused_and_changes_nothing(cls, backend):
    block = make_block(cls, "identity")
    before = {name: t.clone() for name, t in block.state_dict().items()}
    channels = block.conv1.in_channels
    for x, match in (
        (torch.randn(1, channels, 1, 1), "more than 1 value per channel"),
        (torch.randn(channels, 4, 4), "4D"),
    ):
        with pytest.raises(ValueError, match=match):
            block(x)
        assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


KEYS = {
    BasicBlock: ["conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1"],
    Bottleneck: ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1"],
    PreActBasicBlock: ["bn1", "conv1", "bn2", "conv2", "downsample.0", "downsample.1"],
    PreActBottleneck: ["bn1", "conv1", "bn2", "conv2", "bn3", "conv3", "downsample.0", "downsample.1"],
}


@pytest.mark.parametrize("cls", BLOCKS)
def test_state_dict_keys_in_order(cls):
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    want = []
    for name in KEYS[cls]:
        is_norm = "bn" in name or name == "downsample.1"
        want += [f"{name}.{entry}" for entry in (norm if is_norm else ("weight",))]
    block = make_block(cls, "projection")
    assert list(block.state_dict()) == want
    assert type(block.bn1) is nn.BatchNorm2d
    assert type(block.relu) is nn.ReLU
    assert (block.stride, block.expansion) == (2, 4 if "Bottleneck" in cls.__name__ else 1)


@pytest.mark.parametrize("cls", [PreActBasicBlock, PreActBottleneck])
def test_pre_activation_shortcut_is_the_input_or_reads_the_activation(cls):
    block = make_block(cls, "identity")
    nn.init.zeros_(block.get_submodule("conv3" if cls is PreActBottleneck else "conv2").weight)
    x = torch.randn(2, block.conv1.in_channels, 6, 6)
    assert torch.equal(block(x), x)
    block.downsample = nn.Identity()
    block.eval()
    torch.testing.assert_close(block(x), torch.relu(block.bn1(x)))
