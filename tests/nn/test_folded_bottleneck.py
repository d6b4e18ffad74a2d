"""A Bottleneck as one autograd node, its last convolutions folded: eager's numbers, and what is kept for them."""

import copy
import functools
import gc
import io
import pickle
import weakref
from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import Bottleneck
from fusedres.ops import folding, registry

CHANNELS_LAST = torch.channels_last
ONE_NODE = "FoldedBottleneckFunctionBackward"

SHAPES = {
    "identity": {},
    "projection": {"inplanes": 20},
    "strided projection": {"inplanes": 20, "stride": 2},
    "groups": {"groups": 2, "base_width": 32},
    "dilation": {"inplanes": 24, "dilation": 2},
}


def make_block(shape="identity", seed=0, *, planes=16, norm_layer=None, folding="always", **change):
    """A block whose weights hide no errors."""
    arguments = SHAPES[shape] | change
    inplanes, stride = arguments.pop("inplanes", 4 * planes), arguments.get("stride", 1)
    norm_layer = norm_layer or nn.BatchNorm2d
    torch.manual_seed(seed)
    downsample = None
    if inplanes != 4 * planes or stride != 1:
        conv = nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False)
        downsample = nn.Sequential(conv, norm_layer(4 * planes))
    block = Bottleneck(inplanes, planes, downsample=downsample, norm_layer=norm_layer, **arguments)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.5)
            if m.track_running_stats:
                nn.init.normal_(m.running_mean)
                nn.init.uniform_(m.running_var, 0.5, 1.5)
    block.folding = folding
    return block


def make_image(block, size=(4, 10, 8), seed=0, dtype=torch.float32, spread=1.0):
    """An input of the block; with a small ``spread`` the pixels of an image differ little, and images much."""
    n, h, w = size
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, block.conv1.in_channels, h, w, generator=g)
    if spread != 1.0:
        x = spread * x + torch.randn(n, block.conv1.in_channels, 1, 1, generator=g)
    return x.to(dtype).contiguous(memory_format=CHANNELS_LAST)


def is_one_node(out):
    return type(out.grad_fn).__name__ == ONE_NODE


def assert_close(got, want, rtol=1e-9, atol=1e-9):
    """Of two steps, or of some of their numbers."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# --- the rule ---------------------------------------------------------------------------------------------------------


def few_features(block):
    """Convolutions of neighbours that are nearly those of one pixel; with images that have few features, see below."""
    with torch.no_grad():
        block.conv2.weight.flatten(2)[:, :, [0, 1, 2, 3, 5, 6, 7, 8]] *= 0.02


@pytest.fixture
def check_rule(judge, parted, exact_step, step, eager_twin):
    def check(make, dtype, amp=False, size=(12, 6, 8)):
        def measure(seed):
            block = make(seed) if amp else make(seed).to(dtype)
            wide = dtype == torch.float32
            if not wide:  # images with few features, far apart: what rounding to 16 bits moves stays on its side
                few_features(block)
            x = make_image(block, size, seed, dtype, spread=1.0 if wide else 0.02)
            assert parted(block, x) > (1e-3 if wide else 0.06)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                assert is_one_node(copy.deepcopy(block)(x))
                ours, eager = step(copy.deepcopy(block), x), step(eager_twin(block), x)
            return ours, eager, functools.partial(exact_step, block, x)

        judge(measure, rounded_to=torch.bfloat16 if amp else None)

    return check


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rule(shape, dtype, served, check_rule):
    amp = dtype == "autocast"
    dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    check_rule(lambda seed: make_block(shape, seed), dtype, amp)


def large_mean_of_activations(block):
    nn.init.constant_(block.bn2.bias, 30.0)


def nearly_constant_activations(block):
    nn.init.constant_(block.bn2.weight, 1e-3)


def no_weight_in_the_last_norm(block):
    nn.init.zeros_(block.bn3.weight)


def zero_sum_weights(block):
    with torch.no_grad():
        block.conv3.weight -= block.conv3.weight.mean(1, keepdim=True)


def dead_channels(block):
    with torch.no_grad():
        block.bn2.weight[::4] = 0
        block.bn2.bias[::4] = -1


HARD = [
    large_mean_of_activations,
    nearly_constant_activations,
    no_weight_in_the_last_norm,
    zero_sum_weights,
    dead_channels,
]


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
@pytest.mark.parametrize("change", HARD, ids=lambda f: f.__name__)
def test_rule_where_it_is_hard(change, shape, served, judge, exact_step, step, eager_twin):
    def measure(seed):
        block, x = make_block(shape, seed), make_image(make_block(shape), seed=seed)
        nn.init.constant_(block.bn1.bias, 6.0)
        nn.init.constant_(block.bn2.bias, 6.0)  # every inner activation counts
        change(block)
        assert is_one_node(copy.deepcopy(block)(x))
        return step(copy.deepcopy(block), x), step(eager_twin(block), x), functools.partial(exact_step, block, x)

    judge(measure)


def test_rule_of_a_shortcut_with_a_large_mean(served, judge, parted, exact_step, step, eager_twin):
    def measure(seed):
        block = make_block("strided projection", seed)
        x = make_image(block, seed=seed) + 10
        assert parted(block, x) > 1e-3
        assert is_one_node(copy.deepcopy(block)(x))
        return step(copy.deepcopy(block), x), step(eager_twin(block), x), functools.partial(exact_step, block, x)

    judge(measure)


def mixed_norms(channels):
    """A different kind in every place."""
    mixed_norms.calls += 1
    kinds = [
        {"momentum": None, "eps": 1e-3},
        {"affine": False, "momentum": 0.7},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False, "eps": 0.1},
    ]
    return nn.BatchNorm2d(channels, **kinds[mixed_norms.calls % 4])


NORMS = {
    "cumulative average": functools.partial(nn.BatchNorm2d, momentum=None),
    "no affine": functools.partial(nn.BatchNorm2d, affine=False),
    "no running statistics": functools.partial(nn.BatchNorm2d, track_running_stats=False),
    "nothing": functools.partial(nn.BatchNorm2d, affine=False, track_running_stats=False, momentum=0.0),
    "no activation of its own": functools.partial(fusedres.BatchNormAct2d, act=None),
    "no bias": functools.partial(fusedres.BatchNormAct2d, act=None, bias=False),
    "mixed": mixed_norms,
}


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_as_in_eager(norm, shape, served, step, eager_twin):
    """Three steps in float64: outputs, gradients, statistics and counters."""
    mixed_norms.calls = 0
    block = make_block(shape, norm_layer=NORMS[norm]) if "bias" not in norm else make_biasless(shape)
    block = block.double()
    twin = eager_twin(block)
    for seed in range(3):
        x = make_image(block, seed=seed, dtype=torch.float64)
        assert is_one_node(copy.deepcopy(block)(x))
        got, want = step(block, x), step(twin, x)
        assert_close(got, want)


def make_biasless(shape):
    block = make_block(shape)
    for module in list(block.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = fusedres.BatchNormAct2d(child.num_features, act=None, bias=False)
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                setattr(module, name, norm)
    return block


@pytest.mark.parametrize("shape", SHAPES)
def test_one_node_in_float64(shape, served, step, eager_twin):
    block = make_block(shape, planes=10).double()
    x = make_image(block, (5, 9, 7), dtype=torch.float64)
    assert is_one_node(copy.deepcopy(block)(x))
    want, got = step(eager_twin(block), x), step(block, x)
    assert_close(got, want)


@pytest.mark.parametrize(("pixels", "folds"), [(64, True), (63, False)])
def test_four_pixels_per_channel(pixels, folds, served, step, eager_twin):
    block = make_block().double()
    x = make_image(block, (1, pixels // (8 if folds else 9), 8 if folds else 9), dtype=torch.float64)
    assert is_one_node(copy.deepcopy(block)(x)) == folds
    want, got = step(eager_twin(block), x), step(block, x)
    assert_close(got, want)


def test_four_pixels_per_channel_of_the_projection(served, step, eager_twin):
    for inplanes, folds in ((18, True), (19, False)):
        block = make_block("strided projection", planes=8, inplanes=inplanes).double()
        x = make_image(block, (2, 12, 12), dtype=torch.float64)  # 72 pixels of the output
        assert is_one_node(copy.deepcopy(block)(x)) == folds
        want, got = step(eager_twin(block), x), step(block, x)
        assert_close(got, want)


# --- which calls are one node -----------------------------------------------------------------------------------------


def test_what_is_one_node(served, monkeypatch):
    monkeypatch.setattr(registry, "CPU_CAPABILITY", "avx512")  # where "auto" was measured

    def is_one(block=None, x=None, **change):
        block = make_block(**change) if block is None else block
        x = make_image(block) if x is None else x
        return is_one_node(block(x))

    assert is_one()
    assert not is_one(folding="never")
    assert not is_one(folding="auto")  # too small to gain
    large = make_block(planes=64, folding="auto")
    assert is_one(large, make_image(large, (8, 28, 28)))
    assert not is_one(make_block().eval())
    assert not is_one(make_block().half(), make_image(make_block(), dtype=torch.float16))
    assert is_one(make_block().bfloat16(), make_image(make_block(), dtype=torch.bfloat16))
    for name, _ in make_block("projection").named_parameters():
        block = make_block("projection")
        block.get_parameter(name).requires_grad_(False)
        assert not is_one(block), name
    with torch.no_grad():
        assert make_block()(make_image(make_block())).grad_fn is None
    assert not is_one(x=make_image(make_block(), (0, 8, 8)))
    assert not is_one(x=make_image(make_block()) * float("nan"))
    block = make_block()
    block.downsample = nn.Identity()
    assert not is_one(block)
    block = make_block("projection")
    block.downsample = nn.Sequential(nn.AvgPool2d(1), *block.downsample)
    assert not is_one(block)


def test_environment_and_refused_words(monkeypatch, served):
    block, x = make_block(folding="auto"), make_image(make_block())
    monkeypatch.setattr(folding, "_default", "always")
    assert is_one_node(block(x))
    monkeypatch.setattr(folding, "_default", "never")
    assert not is_one_node(block(x))
    before = {name: t.clone() for name, t in block.state_dict().items()}
    block.folding = "sometimes"
    with pytest.raises(ValueError, match="folding must be one of auto, always, never, but got 'sometimes'"):
        block(x)
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


def test_auto_gives_eager_s_numbers(served, monkeypatch, exact_step, step, eager_twin, judge):
    monkeypatch.setattr(registry, "CPU_CAPABILITY", "avx512")

    def measure(seed):
        block = make_block(seed=seed, planes=64, folding="auto")
        for norm in (block.bn1, block.bn2):
            nn.init.constant_(norm.bias, 6.0)
        x = make_image(block, (8, 28, 28), seed)
        assert is_one_node(copy.deepcopy(block)(x))
        return step(copy.deepcopy(block), x), step(eager_twin(block), x), functools.partial(exact_step, block, x)

    judge(measure, draws=2)


# --- tensors as they come ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
@pytest.mark.parametrize("layout", fusedres.verification.LAYOUTS)
def test_layouts_of_x_and_of_its_gradient(layout, shape, served, eager_twin):
    """In each layout of x; the output's gradient in the same one."""
    block = make_block(shape).double()
    twin, results = eager_twin(block), []
    for module in (block, twin):
        x = make_image(block, dtype=torch.float64).contiguous()
        x = fusedres.verification.lay_out(x, layout).requires_grad_()
        out = module(x)
        dy = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        dy = fusedres.verification.lay_out(dy, layout)
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], dy), *module.buffers()])
        if layout == "channels_last" and module is block:
            assert is_one_node(out)
            assert out.is_contiguous(memory_format=CHANNELS_LAST)
            assert results[-1][1].is_contiguous(memory_format=CHANNELS_LAST)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wanted", ["x", "parameters", "conv3", "conv1", "norms"])
def test_some_of_the_gradients(wanted, served, eager_twin):
    """What is asked for has the bits that it has among all; a first block's input has no gradient."""
    block = make_block("projection")
    parameters = dict(block.named_parameters())
    chosen = {
        "x": [],
        "parameters": list(parameters),
        "conv3": ["conv3.weight"],
        "conv1": ["conv1.weight"],
        "norms": [name for name in parameters if "bn" in name],
    }[wanted]
    results = []
    for everything in (True, False):
        module = copy.deepcopy(block)
        x = make_image(block).requires_grad_(everything or wanted == "x")
        out = module(x)
        assert is_one_node(out)
        names = list(parameters) if everything else chosen
        leaves = [x] * x.requires_grad + [module.get_parameter(name) for name in names]
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out) + out.detach())
        results.append(dict(zip(["x"] * x.requires_grad + names, grads, strict=True)))
    everything, some = results
    assert list(some) == ([wanted] if wanted == "x" else chosen)
    for name in some:
        torch.testing.assert_close(some[name], everything[name], rtol=1e-5, atol=1e-6)


def test_backward_of_a_sum_twice_and_accumulated(served, eager_twin):
    """An expanded gradient; a graph that is kept; one block called twice before backward."""
    block = make_block().double()
    twin, results = eager_twin(block), []
    for module in (block, twin):
        x = make_image(block, dtype=torch.float64).requires_grad_()
        out = module(module(x))
        loss = out.sum() + (x * x).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-8)


def test_gradients_keep_strides_and_dtype(served):
    block = make_block("projection").to(memory_format=CHANNELS_LAST)
    block(make_image(block)).sum().backward()
    assert all(p.grad.stride() == p.stride() for p in block.parameters())


@pytest.mark.parametrize("shape", ["identity", "projection"])
def test_x_and_the_graph_are_left_alone(shape, served):
    """x keeps its values although the block's ReLU is in place, and nothing holds it when the graph is gone."""
    block = make_block(shape)
    assert block.relu.inplace
    x = make_image(block)
    kept, source = x.clone(), x.requires_grad_()
    x = source * 1
    out = block(x)
    assert torch.equal(x, kept)
    freed = weakref.ref(out.grad_fn)
    held = weakref.ref(x)
    out.sum().backward()
    del out, x
    gc.collect()
    assert freed() is None
    assert held() is None


def test_output_may_be_changed_in_place(served, eager_twin):
    """What follows a block in eager may write into its output; ours saves bits of it."""
    block = make_block().double()
    results = []
    for module in (block, eager_twin(block)):
        x = make_image(block, dtype=torch.float64)
        out = module(x)
        if module is block:
            out.detach().mul_(3)  # behind autograd's back: nothing of the output is read again
        dy = make_image(block, dtype=torch.float64, seed=1)
        results.append(torch.autograd.grad(out, list(module.parameters()), dy))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["x", "conv1.weight", "conv2.weight", "conv3.weight", "bn2.weight", "downsample.0.weight"]
)
def test_change_in_place_before_backward_raises(name, served):
    block = make_block("projection")
    x = make_image(block).requires_grad_() * 1
    out = block(x)
    assert is_one_node(out)
    with torch.no_grad():
        (x if name == "x" else block.get_parameter(name)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_backward_of_a_freed_graph_raises(served):
    out = make_block()(make_image(make_block()))
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("target", ["x", "conv1.weight", "conv3.weight", "bn3.bias"])
def test_specials_as_in_eager(target, value, served, step, eager_twin):
    block = make_block("projection").double()
    x = make_image(block, dtype=torch.float64)
    with torch.no_grad():
        (x if target == "x" else block.get_parameter(target)).flatten()[3] = value
    want, got = step(eager_twin(block), x), step(block, x)
    for name in want:
        torch.testing.assert_close(
            torch.where(got[name].isfinite(), got[name], torch.nan) if want[name].is_floating_point() else got[name],
            torch.where(want[name].isfinite(), want[name], torch.nan) if want[name].is_floating_point() else want[name],
            rtol=1e-8,
            atol=1e-8,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_nan_in_the_gradient_that_comes_in(served, eager_twin):
    block = make_block("projection").double()
    results = []
    for module in (block, eager_twin(block)):
        x = make_image(block, dtype=torch.float64).requires_grad_()
        out = module(x)
        dy = torch.ones_like(out)
        dy[out == out.max()] = float("nan")
        results.append(torch.autograd.grad(out, [x, *module.parameters()], dy))
    assert results[1][0].isnan().any()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, equal_nan=True)


# --- whoever wants to see the modules, or plain operators -------------------------------------------------------------

PARTS = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample", "downsample.0", "downsample.1", "relu"]


def with_hook(block, name, kind, seen):
    """The hook changes what it sees, so that the numbers tell whether it ran."""
    block.relu.inplace = False  # in place, eager refuses a backward hook on the norm before it
    module = block.get_submodule(name)
    if kind == "forward":
        module.register_forward_hook(lambda m, args, out: seen.append(name) or 2 * out)
    elif kind == "forward_pre":
        module.register_forward_pre_hook(lambda m, args: seen.append(name) or (args[0] + 1,))
    elif kind == "backward":
        module.register_full_backward_hook(lambda m, gin, gout: seen.append(name) or (2 * gin[0],))
    else:
        module.register_full_backward_pre_hook(lambda m, gout: seen.append(name) or (2 * gout[0],))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
@pytest.mark.parametrize("name", PARTS)
def test_hooks_run_as_in_eager(name, kind, eager_twin, step):
    block, results = make_block("projection").double(), []
    x = make_image(block, dtype=torch.float64)
    twin = eager_twin(block)
    for module, inner in ((block, block), (twin, twin.block)):
        seen = []
        with_hook(inner, name, kind, seen)
        results.append((step(module, x), seen))
    (got, ours), (want, theirs) = results
    assert ours == theirs != []
    assert_close(got, want)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_global_hooks_see_every_module(kind, eager_twin, step):
    block = make_block("projection").double()
    block.relu.inplace = False
    twin, counts = eager_twin(block), []
    x = make_image(block, dtype=torch.float64)
    for module, inner in ((block, block), (twin, twin.block)):
        names = {m: name for name, m in inner.named_modules() if name}
        seen = Counter()
        register = getattr(module_hooks, f"register_module_{kind}_hook")
        handle = register(lambda m, *args, seen=seen, names=names: seen.update([names.get(m, "block")]))
        try:
            result = step(module, x)
        finally:
            handle.remove()
        seen.pop("block")
        counts.append((seen, result))
    assert counts[0][0] == counts[1][0]
    assert set(counts[0][0]) == set(PARTS)
    assert_close(counts[0][1], counts[1][1])


def test_a_removed_hook_leaves_one_node(served):
    block = make_block()
    handle = block.bn2.register_forward_hook(lambda *args: None)
    x = make_image(block)
    assert not is_one_node(block(x))
    handle.remove()
    assert is_one_node(block(x))
    block.register_forward_hook(lambda *args: None)  # of the block itself
    block.conv2.weight.register_hook(lambda grad: 3 * grad)
    twin = copy.deepcopy(block)
    out = block(x)
    assert is_one_node(out)
    (grad,) = torch.autograd.grad(out.sum(), block.conv2.weight)
    (plain,) = torch.autograd.grad(twin(x).sum(), twin.conv2.weight)
    assert torch.equal(grad, 3 * plain)


@pytest.mark.parametrize("name", [name for name, _ in make_block("projection").named_parameters()])
def test_a_frozen_parameter(name, eager_twin):
    block = make_block("projection").double()
    block.get_parameter(name).requires_grad_(False)
    twin, results = eager_twin(block), []
    for module, inner in ((block, block), (twin, twin.block)):
        x = make_image(block, dtype=torch.float64).requires_grad_()
        out = module(x)
        out.backward(make_image(make_block(), dtype=torch.float64, seed=1))
        assert inner.get_parameter(name).grad is None
        results.append([out, x.grad, *(p.grad for p in inner.parameters() if p.grad is not None), *inner.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
@pytest.mark.parametrize("name", ["bn1", "bn2", "bn3", "downsample.1", "all"])
def test_frozen_statistics(name, shape, eager_twin, step):
    block = make_block(shape).double()
    if name == "all":
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    elif name == "downsample.1" and shape == "identity":
        pytest.skip("no shortcut")
    else:
        block.get_submodule(name).eval()
    x = make_image(block, dtype=torch.float64)
    for _ in range(2):
        want, got = step(eager_twin(block), x), step(block, x)
        assert_close(got, want)


def _conv(block, name, **change):
    conv = block.get_submodule(name)
    own = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding, "bias": False}
    return nn.Conv2d(conv.in_channels, conv.out_channels, **own | change)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x + 1) * 2


SWAPS = {
    "group norm": ("bn2", lambda b: nn.GroupNorm(4, 16)),
    "instance norm": ("bn3", lambda b: nn.InstanceNorm2d(64, affine=True)),
    "identity for a norm": ("bn1", lambda b: nn.Identity()),
    "subclass": ("bn2", lambda b: Doubled(16)),
    "norm with activation": ("bn1", lambda b: fusedres.BatchNormAct2d(16)),
    "last norm with activation": ("bn3", lambda b: fusedres.BatchNormAct2d(64)),
    "conv1 with bias": ("conv1", lambda b: _conv(b, "conv1", bias=True)),
    "conv2 with bias": ("conv2", lambda b: _conv(b, "conv2", bias=True)),
    "conv3 with bias": ("conv3", lambda b: _conv(b, "conv3", bias=True)),
    "shortcut with bias": ("downsample.0", lambda b: _conv(b, "downsample.0", bias=True)),
    "conv1 3x3": ("conv1", lambda b: _conv(b, "conv1", kernel_size=3, padding=1)),
    "conv3 3x3": ("conv3", lambda b: _conv(b, "conv3", kernel_size=3, padding=1)),
    "conv3 in groups": ("conv3", lambda b: _conv(b, "conv3", groups=4)),
    "shortcut 3x3": ("downsample.0", lambda b: _conv(b, "downsample.0", kernel_size=3, padding=1)),
    "shortcut in groups": ("downsample.0", lambda b: _conv(b, "downsample.0", groups=4)),
    "conv2 same": ("conv2", lambda b: _conv(b, "conv2", padding="same", stride=1)),
    "conv2 5x3": ("conv2", lambda b: _conv(b, "conv2", kernel_size=(5, 3), padding=(2, 1))),
    "conv2 reflects": ("conv2", lambda b: _conv(b, "conv2", padding_mode="reflect")),
    "conv2 transposed": ("conv2", lambda b: nn.ConvTranspose2d(16, 16, 3, 1, 1)),
    "conv2 identity": ("conv2", lambda b: nn.Identity()),
    "two convolutions": ("conv2", lambda b: nn.Sequential(_conv(b, "conv2"), nn.Conv2d(16, 16, 1))),
    "silu": ("relu", lambda b: nn.SiLU()),
    "no activation": ("relu", lambda b: nn.Identity()),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_modules(swap, eager_twin, step):
    name, make = SWAPS[swap]
    block = make_block("projection")
    torch.manual_seed(1)
    block.set_submodule(name, make(block))
    block = block.double()
    x = make_image(block, dtype=torch.float64)
    want, got = step(eager_twin(block), x), step(block, x)
    assert_close(got, want)


def test_swapped_shortcut_of_another_size(eager_twin, step):
    block = make_block("strided projection").double()
    block.downsample[0].stride = (2, 1)
    block.conv2.stride = (2, 1)
    x = make_image(block, dtype=torch.float64)
    want, got = step(eager_twin(block), x), step(block, x)
    assert_close(got, want)


def test_parametrized_and_patched(eager_twin, step):
    block = make_block("projection").double()
    parametrizations.weight_norm(block.conv3)
    torch.nn.utils.parametrize.register_parametrization(block.bn2, "weight", nn.Softplus())
    x = make_image(block, dtype=torch.float64)
    want, got = step(eager_twin(block), x), step(block, x)
    assert_close(got, want)
    patched = make_block("projection").double()
    patched.conv2.forward = lambda t: torch.zeros_like(t)
    assert torch.equal(patched(x), patched(x * 3) * 0 + patched(x))


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(context, shape, served, eager_twin):
    block = make_block(shape).double()
    x = make_image(block, dtype=torch.float64)
    twin = eager_twin(block)
    with context():
        out, want = block(x), twin(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    for got, buffer in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, buffer, rtol=1e-9, atol=1e-9)
    assert is_one_node(block(x))


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
def test_compile_fullgraph(shape, served, step, eager_twin):
    torch._dynamo.reset()
    block = make_block(shape).double()
    x = make_image(block, dtype=torch.float64)
    want = step(eager_twin(block), x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = compiled(leaf)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, [leaf, *block.parameters()], dy)
    got = {"output": out.detach(), **dict(zip(list(want)[1:], grads, strict=False)), **dict(block.named_buffers())}
    assert_close(got, want)


def test_symbolic_trace(step, eager_twin):
    block = make_block("projection").double()
    traced = fx.symbolic_trace(copy.deepcopy(block))
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert called == set(PARTS) - {"downsample"}
    x = make_image(block, dtype=torch.float64)
    want, got = step(eager_twin(block), x), step(traced, x)
    assert_close(got, want)


def test_jit_trace_and_export(eager_twin):
    block = make_block("projection").double()
    x = make_image(block, dtype=torch.float64)
    want = eager_twin(block)(x)
    traced = torch.jit.trace(copy.deepcopy(block), x, check_trace=False)
    torch.testing.assert_close(traced(x), want, rtol=1e-9, atol=1e-9)
    exported = torch.export.export(copy.deepcopy(block), (x,)).module()
    torch.testing.assert_close(exported(x), want, rtol=1e-9, atol=1e-9)


def test_functorch(eager_twin):
    """Gradients with respect to parameters, vjp, and forward mode."""
    block = make_block("projection", norm_layer=NORMS["no running statistics"]).double()
    twin = eager_twin(block).block
    x = make_image(block, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def of(module):
        def loss(parameters, x):
            return torch.func.functional_call(module, parameters, x).square().sum()

        out, pull = torch.func.vjp(lambda x: torch.func.functional_call(module, parameters, x), x)
        _, tangent = torch.func.jvp(lambda x: torch.func.functional_call(module, parameters, x), (x,), (x,))
        return [*torch.func.grad(loss)(parameters, x).values(), out, *pull(torch.ones_like(out)), tangent]

    twin.forward = lambda x, b=twin: b.relu(
        b.bn3(b.conv3(b.relu(b.bn2(b.conv2(b.relu(b.bn1(b.conv1(x)))))))) + b.downsample(x)
    )
    for got, want in zip(of(block), of(twin), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_vmap(eager_twin):
    block = make_block("projection", norm_layer=NORMS["no running statistics"]).double()
    twin = eager_twin(block)
    x = make_image(block, dtype=torch.float64)
    batch = torch.stack([x, 2 * x + 1])
    want = torch.stack([twin(t) for t in batch])
    torch.testing.assert_close(torch.func.vmap(block)(batch), want, rtol=1e-9, atol=1e-9)


def test_fake_tensors():
    block, x = make_block("projection"), make_image(make_block("projection"))
    for _ in range(2):
        module = copy.deepcopy(block)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            out = module(mode.from_tensor(x))
        assert out.shape == (4, 64, 10, 8)
        block(x)  # which decides


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
def test_saved_on_the_cpu(shape, served, step):
    """Through hooks that give back copies."""
    block = make_block(shape)
    x = make_image(block)
    want = step(copy.deepcopy(block), x)
    with torch.autograd.graph.save_on_cpu():
        got = step(copy.deepcopy(block), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t * 1):
        again = step(copy.deepcopy(block), x)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(torch.equal(again[name], want[name]) for name in want)


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, shape, served, eager_twin):
    block = make_block(shape).double()
    results = []
    for module in (block, eager_twin(block)):
        x = make_image(block, dtype=torch.float64).requires_grad_()
        out = checkpoint(module, x, use_reentrant=reentrant)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("called", [False, True])
def test_deepcopy_pickle_and_save(called, served, step):
    block = make_block("projection")
    x = make_image(block)
    if called:
        block(x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)]
    assert list(block.state_dict()) == list(make_block("projection").state_dict())
    want = step(block, x)
    for other in copies:
        got = step(other, x)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def pure(block):
    """The block as a function of its input and its parameters, whose statistics stay as they are."""
    names = [name for name, _ in block.named_parameters()]

    def call(x, *parameters):
        module = copy.deepcopy(block)
        out = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)
        assert is_one_node(out)
        return out

    return call, [p.detach().clone().requires_grad_() for p in block.parameters()]


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
@pytest.mark.parametrize("order", [1, 2])
def test_gradcheck(order, shape, served, parted):
    block = make_block(shape, planes=2, inplanes=8 if shape == "identity" else 3).double()
    x = make_image(block, (2, 3, 3) if shape == "identity" else (3, 4, 4), dtype=torch.float64)
    assert parted(block, x) > 1e-3
    function, parameters = pure(block)
    inputs = [x.requires_grad_(), *parameters]
    check = gradcheck if order == 1 else gradgradcheck
    assert check(function, inputs, eps=1e-6, atol=1e-5, fast_mode=order == 2)


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
def test_double_backward_as_eager(shape, served, eager_twin):
    """A gradient penalty with respect to everything, and to the gradient that comes in."""
    block = make_block(shape).double()
    results = []
    for module in (block, eager_twin(block)):
        x = make_image(block, dtype=torch.float64).requires_grad_()
        out = module(x)
        dy = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(out, leaves, dy, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, [*leaves, dy], allow_unused=True)])
    for got, want in zip(*results, strict=True):
        if want is None or got is None:
            assert all(t is None or not t.any() for t in (got, want))
        else:
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * max(1.0, want.abs().max().item()))


# --- what is kept for backward ----------------------------------------------------------------------------------------


def sizes_of(storages, least):
    return sorted(size for size in storages.values() if size >= least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["identity", "projection", "strided projection"])
def test_kept_by_always(shape, dtype, served, saved_storages):
    """The block's input, what conv1 and conv2 gave, a bit per element of the output; no activation."""
    block = make_block(shape).to(dtype)
    x = make_image(block, (8, 16, 16), dtype=dtype).requires_grad_()
    out, storages = saved_storages(lambda: block(x), block)
    assert is_one_node(out)
    element, pixels = dtype.itemsize, 8 * 16 * 16
    kept_pixels = pixels // block.stride**2
    narrow = sorted([16 * pixels * element, 16 * kept_pixels * element])
    wide = x.numel() * element
    bits = 64 * kept_pixels // 8
    matrices = 8 * 4 * (20**2 + 20)  # moments and vectors of float64
    assert storages[x.untyped_storage().data_ptr()] == wide
    assert sizes_of(storages, narrow[0]) == sorted([*narrow, wide])
    assert sum(storages.values()) <= sum(narrow) + wide + bits + matrices + 8 * 4 * 64 * 8
    assert bits in storages.values()
    assert out.untyped_storage().data_ptr() not in storages


def test_kept_by_auto(served, saved_storages, monkeypatch):
    """y1 too, which costs a pass to compute again."""
    monkeypatch.setattr(registry, "CPU_CAPABILITY", "avx512")
    block = make_block(planes=64, folding="auto")
    x = make_image(block, (8, 28, 28)).requires_grad_()
    narrow, wide = 64 * 8 * 28 * 28 * 4, x.numel() * 4
    for recompute, kept in ((False, 3), (True, 2)):
        block.recompute = recompute
        out, storages = saved_storages(lambda: block(x), block)
        assert is_one_node(out)
        assert sizes_of(storages, narrow) == [narrow] * kept + [wide]
        assert sum(storages.values()) <= kept * narrow + wide + x.numel() // 8 + 10 * 8 * (64**2 + 256)


def test_auto_and_always_have_the_same_bits(served, monkeypatch, step):
    """Whether y1 is kept or computed again."""
    monkeypatch.setattr(registry, "CPU_CAPABILITY", "avx512")
    x = make_image(make_block(planes=64), (8, 28, 28))
    results = []
    for mode, recompute in (("always", False), ("auto", False), ("auto", True)):
        block = make_block(planes=64, folding=mode)
        block.recompute = recompute
        results.append(step(block, x))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


def test_no_input_gradient_is_computed_where_none_is_wanted(served, saved_storages):
    """A first block: its input is kept for conv1's weight all the same."""
    block = make_block("projection")
    x = make_image(block)
    out, storages = saved_storages(lambda: block(x), block)
    out.sum().backward()
    assert x.grad is None
    assert x.untyped_storage().data_ptr() in storages


# --- what fails, and what is refused ----------------------------------------------------------------------------------


def _replaced(name, make):
    def change(block, x):
        block.set_submodule(name, make(block))
        return x

    return change


def _expanded_counter(block, x):
    block.bn2.weight = nn.Parameter(torch.ones(5))
    return x


def _short_statistics(block, x):
    block.bn3.running_mean = torch.zeros(5)
    return x


def _eps(block, x):
    block.bn3.eps = -1.0
    return x


def _other_dtype_of_a_weight(block, x):
    block.conv3.weight = nn.Parameter(block.conv3.weight.detach().double())
    return x


def _frozen_counter(block, x):
    block.bn3.running_var = torch.inference_mode()(lambda: torch.ones(64))()
    return x


FAILURES = {
    "channels of x": lambda block, x: x[:, :7].contiguous(memory_format=CHANNELS_LAST),
    "no channels": lambda block, x: x[:, :0],
    "3-D": lambda block, x: x[0],
    "5-D": lambda block, x: x[None],
    "dtype of x": lambda block, x: x.double(),
    "half": lambda block, x: x.bfloat16(),
    "integer": lambda block, x: x.long(),
    "complex": lambda block, x: x.to(torch.complex64),
    "not a tensor": lambda block, x: x.tolist(),
    "one value": lambda block, x: x[:1, :, :1, :1],
    "conv2": _replaced("conv2", lambda b: nn.Conv2d(12, 16, 3, padding=1, bias=False)),
    "conv2 of another width": _replaced("conv2", lambda b: nn.Conv2d(16, 12, 3, padding=1, bias=False)),
    "conv2 shrinks": _replaced("conv2", lambda b: nn.Conv2d(16, 16, 3, bias=False)),
    "conv2 kernel larger than the image": _replaced("conv2", lambda b: nn.Conv2d(16, 16, 99, bias=False)),
    "conv3": _replaced("conv3", lambda b: nn.Conv2d(12, 64, 1, bias=False)),
    "conv3 of another width": _replaced("conv3", lambda b: nn.Conv2d(16, 32, 1, bias=False)),
    "conv3 strided": _replaced("conv3", lambda b: nn.Conv2d(16, 64, 1, 2, bias=False)),
    "shortcut": _replaced("downsample.0", lambda b: nn.Conv2d(16, 64, 1, bias=False)),
    "shortcut of another width": _replaced("downsample.0", lambda b: nn.Conv2d(20, 32, 1, bias=False)),
    "shortcut strided": _replaced("downsample.0", lambda b: nn.Conv2d(20, 64, 1, 3, bias=False)),
    "bn1": _replaced("bn1", lambda b: nn.BatchNorm2d(12)),
    "bn2": _replaced("bn2", lambda b: nn.BatchNorm2d(12)),
    "bn3": _replaced("bn3", lambda b: nn.BatchNorm2d(32)),
    "weight of bn2": _expanded_counter,
    "statistics of bn3": _short_statistics,
    "eps": _eps,
    "dtype of conv3": _other_dtype_of_a_weight,
}


RUN_ONE_BY_ONE = ("conv2 ", "conv3", "shortcut", "bn", "weight of", "statistics of", "eps", "dtype of conv")


@pytest.mark.parametrize("what", FAILURES)
def test_a_failed_call_leaves_everything(what, served, eager_twin):
    """Eager's class. Nothing has moved; where modules do not fit, no more than in eager."""
    block = make_block("projection")
    x = FAILURES[what](block, make_image(block))
    twin = eager_twin(block)
    before = {name: t.clone() for name, t in block.state_dict().items()}
    with pytest.raises(Exception) as theirs:
        twin(x)
    with pytest.raises(Exception) as ours:
        block(x)
    assert isinstance(ours.value, theirs.type), (ours.value, theirs.value)
    for name, t in block.state_dict().items():
        if what.startswith(RUN_ONE_BY_ONE) and "bn" in name and not torch.equal(t, before[name]):
            torch.testing.assert_close(t, twin.block.state_dict()[name])
        else:
            assert torch.equal(t, before[name]), name


def test_statistics_that_cannot_be_written(served):
    """All move, or none."""
    if fusedres.info()["backend"] == "reference":
        pytest.skip("its batch norm writes one after the other")
    for make in (lambda: torch.ones(1).expand(64), lambda: torch.inference_mode()(lambda: torch.ones(64))()):
        for name in ("running_mean", "running_var"):
            block = make_block("projection")
            setattr(block.bn3, name, make())
            before = {key: t.clone() for key, t in block.state_dict().items()}
            x = make_image(block)
            try:
                block(x)
            except RuntimeError:
                assert all(torch.equal(t, before[key]) for key, t in block.state_dict().items())
            else:
                assert not any(torch.equal(t, before[key]) for key, t in block.named_buffers())


def test_an_exception_from_outside_leaves_everything(served, monkeypatch):
    """conv2 runs out of memory, say."""
    block = make_block("projection")
    x = make_image(block)
    before = {name: t.clone() for name, t in block.state_dict().items()}
    want = copy.deepcopy(block)(x)

    class Fails(torch.utils._python_dispatch.TorchDispatchMode):
        convolutions = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution" in str(func):
                self.convolutions += 1
                if args[1].shape[2:] == (3, 3):
                    raise torch.OutOfMemoryError("of the device")
            return func(*args, **(kwargs or {}))

    with pytest.raises(torch.OutOfMemoryError), Fails() as mode:
        block(x)
    assert mode.convolutions
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())
    assert torch.equal(block(x), want)


def nearly_equal_channels(block):
    """What conv3 reads; and it sums differences: its weights, rounded, are then wrong by more than the result."""
    with torch.no_grad():
        weight = block.conv2.weight
        weight.copy_(weight[:1] + 0.01 * weight)
        block.bn2.weight.fill_(1.0)
        block.bn2.bias.fill_(6.0)
        block.bn1.bias.fill_(6.0)
        block.conv3.weight -= block.conv3.weight.mean(1, keepdim=True)


@pytest.mark.parametrize("shape", ["identity", "strided projection"])
def test_guard(shape, served, judge, exact_step, step, eager_twin):
    """Refused after the moments were seen: eager's numbers, and statistics that moved once."""

    def measure(seed):
        block = make_block(shape, seed, planes=32).bfloat16()
        nearly_equal_channels(block)
        x = make_image(block, (4, 14, 14), seed, torch.bfloat16)
        ours = copy.deepcopy(block)
        assert not is_one_node(ours(x))
        assert ours._folding_decision.safe is False
        assert {int(m.num_batches_tracked) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)} == {1}
        ours, eager = step(copy.deepcopy(block), x), step(eager_twin(block), x)
        return ours, eager, functools.partial(exact_step, block, x)

    judge(measure)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["identity", "strided projection"])
def test_bits_depend_neither_on_run_nor_on_threads(shape, dtype, step):
    """Of what the library's convolutions compute in backward on the run alone: as in eager."""
    block = make_block(shape, planes=32).to(dtype)
    x = make_image(block, (4, 28, 28), dtype=dtype)
    assert is_one_node(copy.deepcopy(block)(x))
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(step(copy.deepcopy(block), x))
    first, other, again = results
    for name in first:
        assert torch.equal(again[name], first[name]), name
        if not name.startswith(("dx", "grad of conv1", "grad of bn1", "grad of conv2", "grad of bn2")):
            assert torch.equal(other[name], first[name]), name
