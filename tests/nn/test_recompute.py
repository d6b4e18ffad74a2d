"""`recompute=True`: of an inner activation only what its norm reads is kept, and the numbers are the same."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import BasicBlock, Bottleneck
from fusedres.nn.norm import conv_norm_act_max_pool

CHANNELS_LAST = torch.channels_last
BLOCKS = [BasicBlock, Bottleneck]


def make_block(cls, shortcut="identity", *, recompute=True, folding="never", planes=16, seed=0, norm_layer=None):
    torch.manual_seed(seed)
    outplanes = planes * cls.expansion
    inplanes, stride, downsample = outplanes, 1, None
    if shortcut == "projection":
        inplanes, stride = 12, 2
        conv = nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)
        downsample = nn.Sequential(conv, (norm_layer or nn.BatchNorm2d)(outplanes))
    block = cls(inplanes, planes, stride, downsample, norm_layer=norm_layer)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.5)
    block.recompute, block.folding = recompute, folding
    return block


def make_image(block, size=(4, 10, 8), seed=0, dtype=torch.float32, layout=CHANNELS_LAST):
    generator = torch.Generator().manual_seed(seed)
    n, h, w = size
    x = torch.randn(n, block.conv1.in_channels, h, w, generator=generator).to(dtype)
    return x.contiguous(memory_format=layout)


def assert_close(got, want, rtol=1e-9, atol=1e-9):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"]
)
shortcuts = pytest.mark.parametrize("shortcut", ["identity", "projection"])
blocks = pytest.mark.parametrize("cls", BLOCKS)


@layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@shortcuts
@blocks
def test_same_bits_as_without(cls, shortcut, dtype, layout, backend, step):
    """Outputs and statistics where the same kernels serve; gradients but for the order of their sums."""
    amp = dtype == "autocast"
    dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    results = []
    for recompute in (True, False):
        block = make_block(cls, shortcut, recompute=recompute).to(dtype)
        x = make_image(block, (4, 16, 12), dtype=dtype, layout=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            results.append(step(block, x))
    ours, kept = results
    eps = 2.0**-8 if amp or dtype == torch.bfloat16 else 2.0**-18
    for name, value in kept.items():
        if backend != "auto" and not name.startswith(("dx", "grad")):
            assert torch.equal(ours[name], value), name
        elif value.is_floating_point() and (backend != "auto" or eps < 2.0**-8):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2 * eps * value.abs().max().item())


@layouts
@shortcuts
@blocks
def test_rule(cls, shortcut, layout, served, judge, parted, exact_step, step, eager_twin):
    def measure(seed):
        block = make_block(cls, shortcut, seed=seed)
        x = make_image(block, (6, 16, 12), seed, layout=layout)
        assert parted(block, x) > 1e-3
        return step(copy.deepcopy(block), x), step(eager_twin(block), x), functools.partial(exact_step, block, x)

    judge(measure)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@shortcuts
@blocks
def test_kept_for_backward(cls, shortcut, dtype, recompute, served, saved_storages):
    """The block's input, what each norm reads, with a residual a bit per element; an activation only without."""
    block = make_block(cls, shortcut, recompute=recompute).to(dtype)
    x = make_image(block, (8, 32, 32), dtype=dtype).requires_grad_()
    out, storages = saved_storages(lambda: block(x), block)
    element, inner = dtype.itemsize, 8 * 32 * 32 // block.stride**2
    before_stride = inner if cls is BasicBlock else 8 * 32 * 32  # pixels of what the first norm reads
    first, second = 16 * before_stride * element, 16 * inner * element
    last = out.numel() * element
    kept = [x.numel() * element, first, *([second, last] if cls is Bottleneck else [last])]
    if shortcut == "projection":
        kept.append(last)  # what the shortcut's norm reads
    if not recompute:
        kept += [first, second] if cls is Bottleneck else [first]
    least = min(kept)
    assert sorted(size for size in storages.values() if size >= least) == sorted(kept)
    bits = out.numel() // 8 if shortcut == "identity" else 0
    assert not bits or bits in storages.values()
    assert sum(storages.values()) <= sum(kept) + bits + 8 * 8 * out.size(1)


@shortcuts
@blocks
def test_basic_block_of_always_keeps_no_activation(cls, shortcut, served, saved_storages):
    """`folding="always"` recomputes without being asked to."""
    kept = []
    for mode, recompute in (("always", False), ("always", True)):
        block = make_block(cls, shortcut, folding=mode, recompute=recompute)
        x = make_image(block, (8, 16, 16)).requires_grad_()
        kept.append(sorted(saved_storages(lambda block=block, x=x: block(x), block)[1].values()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "change", ["frozen conv1", "frozen bn1", "frozen conv2", "hook", "eval bn1", "conv bias", "silu"]
)
@shortcuts
@blocks
def test_equals_eager_in_float64(cls, shortcut, change, served, eager_twin):
    block = make_block(cls, shortcut).double()
    seen = []
    if change.startswith("frozen"):
        getattr(block, change.removeprefix("frozen ")).requires_grad_(False)
    elif change == "hook":
        block.relu.inplace = False
        block.bn1.register_forward_hook(lambda m, args, out: seen.append(1) or 2 * out)
    elif change == "eval bn1":
        block.bn1.eval()
    elif change == "conv bias":
        block.conv2 = nn.Conv2d(16, 16, 3, block.conv2.stride, padding=1).double()
    else:
        block.relu = nn.SiLU()
    results = []
    twin = eager_twin(block)
    for module in (block, twin):
        x = make_image(block, dtype=torch.float64).requires_grad_()
        out = module(x)
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out, *torch.autograd.grad(out, leaves, dy), *module.buffers()])
    assert len(seen) == 2 * (change == "hook")
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
@blocks
def test_norms_as_in_eager(cls, arguments, served, step, eager_twin):
    block = make_block(cls, "projection", norm_layer=functools.partial(nn.BatchNorm2d, **arguments)).double()
    twin = eager_twin(block)
    for seed in range(3):
        x = make_image(block, seed=seed, dtype=torch.float64)
        assert_close(step(block, x), step(twin, x))


@blocks
def test_double_backward_compile_checkpoint_and_no_grad(cls, served, eager_twin, step):
    torch._dynamo.reset()
    block = make_block(cls).double()
    x = make_image(block, dtype=torch.float64)
    results = []
    for module in (copy.deepcopy(block), eager_twin(block)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        leaves = [leaf, *module.parameters()]
        first = torch.autograd.grad(module(leaf).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        again = checkpoint(module, leaf, use_reentrant=False)
        with torch.no_grad():
            plain = module(leaf)
        results.append([*first, *second, again, plain, *torch.autograd.grad(again.sum(), leaves), *module.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * max(1.0, want.abs().max().item()))
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf).square().sum(), leaf)[0], results[1][0])


@blocks
def test_a_failed_call_leaves_everything(cls, served, eager_twin):
    block = make_block(cls, "projection")
    block.conv2 = nn.Conv2d(11, 16, 3, padding=1, bias=False)
    before = {name: t.clone() for name, t in block.state_dict().items()}
    for x in (make_image(block), make_image(block)[:, :5], make_image(block).long(), make_image(block)[:1, :, :1, :1]):
        with pytest.raises(Exception) as theirs:
            eager_twin(block)(x)
        with pytest.raises(theirs.type):
            block(x)
        assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


@shortcuts
@blocks
def test_empty_batch(cls, shortcut, served, step, eager_twin):
    block = make_block(cls, shortcut)
    x = make_image(block, (0, 10, 8))
    want, got = step(eager_twin(block), x), step(block, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


@blocks
def test_bits_depend_not_on_the_run(cls, step):
    block = make_block(cls, "projection", planes=32)
    x = make_image(block, (4, 28, 28))
    first, again = (step(copy.deepcopy(block), x) for _ in range(2))
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_attributes_are_those_of_the_class_until_set():
    block = BasicBlock(8, 8)
    assert (block.recompute, block.folding) == (False, "auto")
    assert "recompute" not in vars(block)
    block.recompute = True
    assert copy.deepcopy(block).recompute
    assert not BasicBlock(8, 8).recompute


# --- a stem -----------------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """Convolution, norm, ReLU, pooling: in one call, or one after the other."""

    def __init__(self, recompute=None, **conv):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 7, 2, 3, **({"bias": False} | conv))
        self.bn, self.relu, self.pool = nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias)
        self.recompute = recompute

    def forward(self, x):
        if self.recompute is None:
            return self.pool(self.relu(self.bn(self.conv(x))))
        return conv_norm_act_max_pool(self.conv, self.bn, x, self.pool, self.relu, self.recompute)


def an_image(dtype=torch.float32, layout=CHANNELS_LAST, size=(4, 3, 48, 40)):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).contiguous(memory_format=layout)


@layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("bias", [False, True])
def test_stem_has_the_same_bits(bias, dtype, layout, served, step):
    amp, dtype = dtype == "autocast", torch.bfloat16 if dtype == "bfloat16" else torch.float32
    x = an_image(dtype, layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        ours, kept = (step(Stem(recompute, bias=bias).to(dtype), x) for recompute in (True, False))
    for name, value in kept.items():
        assert torch.equal(ours[name], value), name


def test_stem_equals_eager_to_the_second_derivative(served):
    results = []
    for recompute in (True, None):
        stem = Stem(recompute).double()
        x = an_image(torch.float64).requires_grad_()
        leaves = [x, *stem.parameters()]
        out = stem(x)
        first = torch.autograd.grad((out * out * out).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([out, *first, *second, *stem.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * max(1.0, want.abs().max().item()))


class Convolved(TorchDispatchMode):
    """Weak references to what convolutions give."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.storages.append(StorageWeakRef(out.untyped_storage()))
        return out


@pytest.mark.parametrize("recompute", [True, False])
def test_stem_lets_go_of_what_the_convolution_gave(recompute, served):
    stem, x = Stem(recompute), an_image(size=(4, 3, 96, 96))
    with Convolved() as convolved:
        out = stem(x)
    assert [storage.expired() for storage in convolved.storages] == [recompute]
    out.sum().backward()
    assert [storage.expired() for storage in convolved.storages] == [True]


@pytest.mark.parametrize("name", ["x", "conv.weight"])
def test_stem_with_an_operand_that_has_changed(name, served):
    """Raises rather than compute with other values."""
    stem, x = Stem(True), an_image()
    out = stem(x)
    with torch.no_grad():
        (x if name == "x" else stem.conv.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_stem_under_hooks_of_others(reentrant, served, step):
    x = an_image()
    want = step(Stem(False), x)
    with torch.autograd.graph.save_on_cpu():
        got = step(Stem(True), x)
    assert all(torch.equal(got[name], want[name]) for name in want)
    stem, leaf = Stem(True), x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = checkpoint(stem, leaf, use_reentrant=reentrant)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out))
    assert torch.equal(leaf.grad, want["dx"])
    assert torch.equal(stem.conv.weight.grad, want["grad of conv.weight"])


@pytest.mark.parametrize("change", ["frozen conv", "frozen norm", "eval", "hook", "no_grad"])
def test_stem_on_the_plain_path(change, served):
    results = []
    for recompute in (True, None):
        stem, seen = Stem(recompute).double(), []
        if change.startswith("frozen"):
            (stem.conv if change == "frozen conv" else stem.bn).requires_grad_(False)
        elif change == "eval":
            stem.bn.eval()
        elif change == "hook":
            stem.relu.register_forward_hook(lambda m, args, out, seen=seen: seen.append(1) or 2 * out)
        x = an_image(torch.float64).requires_grad_(change != "no_grad")
        with torch.set_grad_enabled(change != "no_grad"):
            out = stem(x)
        leaves = [] if change == "no_grad" else [x, *(p for p in stem.parameters() if p.requires_grad)]
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out, *(torch.autograd.grad(out, leaves, dy) if leaves else ()), *stem.buffers()])
        assert len(seen) == (change == "hook")
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_network_hands_it_to_its_blocks_and_stem(served, step):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = fusedres.models.resnet18(num_classes=5, recompute=recompute, folding="never").double()
        assert {m.recompute for m in net.modules() if isinstance(m, BasicBlock)} == {recompute}
        results.append(step(net, an_image(torch.float64, size=(2, 3, 64, 64))))
    assert_close(*results, rtol=1e-8, atol=1e-8)
