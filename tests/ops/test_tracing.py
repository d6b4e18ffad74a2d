"""Compilers and tracers: what they record must have the right values and, above all, the right gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import fusedres
from fusedres import functional as F


class Everything(nn.Module):
    """Every op once, through modules and through functions."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        norm = fusedres.BatchNormAct2d if fused else nn.BatchNorm2d
        self.bn1, self.bn2, self.bn3, self.bn4 = (norm(8) for _ in range(4))

    def _stats(self, bn: nn.BatchNorm2d) -> tuple[Tensor, ...]:
        return bn.running_mean, bn.running_var, bn.weight, bn.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.fused:
            z, y = y, self.bn1(y)
            z = self.bn2(z, y)
            z = F.batch_norm_add_batch_norm_act(
                z, *self._stats(self.bn3), y, *self._stats(self.bn4), training=self.training
            )
            z = F.add_act(z, y)
            return F.batch_norm_act_max_pool(z, *self._stats(self.bn3), training=self.training)
        z, y = y, torch.relu(self.bn1(y))
        z = torch.relu(self.bn2(z) + y)
        a = nn.functional.batch_norm(z, *self._stats(self.bn3), self.training)
        z = torch.relu(a + nn.functional.batch_norm(y, *self._stats(self.bn4), self.training))
        z = torch.relu(z + y)
        z = torch.relu(nn.functional.batch_norm(z, *self._stats(self.bn3), self.training))
        return nn.functional.max_pool2d(z, 3, 2, 1)


def _pair() -> tuple[Everything, Everything]:
    torch.manual_seed(0)
    fused, plain = Everything(), Everything(fused=False)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def _step(module: nn.Module, x: Tensor, owner: nn.Module | None = None) -> list[Tensor]:
    """Output, gradients of x and of the parameters, buffers."""
    owner = owner or module
    for p in owner.parameters():
        p.grad = None
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    out.square().sum().backward()
    gradients = [p.grad if p.grad is not None else torch.full_like(p, float("nan")) for p in owner.parameters()]
    return [out.detach(), x.grad, *gradients, *(b.clone() for b in owner.buffers())]


def _close(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, i=i: f"value {i}: {m}")


X = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_aot_eager(dynamic, training, backend) -> None:
    """One graph, no breaks; two batch sizes through one dynamic graph."""
    torch._dynamo.reset()
    fused, plain = _pair()
    fused.train(training)
    plain.train(training)
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (4, 3, 2) if dynamic else (4, 4):
        x = X[:size].contiguous(memory_format=torch.channels_last)
        _close(_step(compiled, x, fused), _step(plain, x))


def test_compile_inductor() -> None:
    """The default compiler, under auto: what a user of torch.compile(model) gets."""
    torch._dynamo.reset()
    fused, plain = _pair()
    compiled = torch.compile(fused, fullgraph=True)
    for _ in range(2):
        _close(_step(compiled, X, fused), _step(plain, X))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("amp", [False, True], ids=["f32", "bf16"])
def test_compile_inductor_of_every_op(call, amp, dynamic) -> None:
    torch._dynamo.reset()
    tensors = call.tensors(torch.float32)
    values = [tensors[n] for n in call.names(tensors)]
    results = []
    for which in ("ours", "eager"):
        pure = call.function(which, tensors)
        f = torch.compile(pure, fullgraph=True, dynamic=dynamic) if which == "ours" else pure
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = f(*values)
        results.append([out, *torch.autograd.grad(out.float().sum(), values)])
    tolerance = 5e-2 if amp else 1e-4
    for mine, theirs in zip(*results, strict=True):
        # Of few values one may round to the other side.
        assert ((mine - theirs).abs() > tolerance * (1 + theirs.abs())).sum() <= max(1, 0.02 * mine.numel())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compile_each_op(main_call, mode, backend) -> None:
    torch._dynamo.reset()
    tensors = main_call.tensors(torch.float32)
    values = [tensors[n] for n in main_call.names(tensors)]
    results = []
    for which in ("ours", "eager"):
        pure = main_call.function(which, tensors)
        f = torch.compile(pure, fullgraph=True, backend="aot_eager") if which == "ours" else pure
        if mode == "eval":
            with torch.no_grad():
                results.append([f(*values)])
        else:
            out = f(*values)
            results.append([out, *torch.autograd.grad(out.square().sum(), values)])
    _close(*results)


def test_compile_same_tensor_twice(backend) -> None:
    """bn(x) + x, and x + x: Dynamo wants every tensor of an autograd.Function once."""
    torch._dynamo.reset()

    def f(x: Tensor) -> Tensor:
        y = F.add_act(x, x)
        return F.batch_norm_act(y, None, None, residual=y, training=True)

    x = X.clone().requires_grad_()
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    y = torch.relu(x + x)
    want = torch.relu(nn.functional.batch_norm(y, None, None, training=True) + y)
    _close([out, *torch.autograd.grad(out.sum(), x)], [want, *torch.autograd.grad(want.sum(), x)])


def test_compile_does_not_recompile_or_break(backend) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = nn.Sequential(fusedres.BatchNormAct2d(3), nn.Conv2d(3, 3, 1), fusedres.BatchNormAct2d(3))
    compiled = torch.compile(module, backend=counter)
    for _ in range(4):
        compiled(X).sum().backward()
    assert counter.frame_count == 1
    assert module[0].num_batches_tracked == 4


def test_compile_with_counter_and_cumulative_average(backend) -> None:
    """momentum=None inside a compiled graph follows the counter and does not freeze it into the graph."""
    torch._dynamo.reset()
    module = fusedres.BatchNormAct2d(3, momentum=None, act=None)
    plain = nn.BatchNorm2d(3, momentum=None)
    compiled = torch.compile(module, backend="aot_eager")
    for step in range(4):
        compiled(X + step)
        plain(X + step)
    assert module.num_batches_tracked == 4
    torch.testing.assert_close(module.running_mean, plain.running_mean)
    torch.testing.assert_close(module.running_var, plain.running_var)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict, training, backend) -> None:
    fused, plain = _pair()
    fused.train(training)
    plain.train(training)
    exported = torch.export.export(fused, (X,), strict=strict, dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    module = exported.module()
    for x in (X, X[:3]):
        with torch.no_grad():
            torch.testing.assert_close(module(x), plain(x), rtol=1e-3, atol=1e-4)
    if not training:
        _close(_step(module, X)[:2], _step(plain, X)[:2])
        gradients = {name: p.grad for name, p in module.named_parameters()}
        for name, p in plain.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-2)


def test_exported_program_can_be_saved_and_decomposed(tmp_path) -> None:
    fused, plain = _pair()
    exported = torch.export.export(fused.eval(), (X,))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(X), plain.eval()(X), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(exported.run_decompositions().module()(X), plain(X), rtol=1e-3, atol=1e-4)


# --- fx ---


def _traced(module: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(module)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fx_symbolic_trace(training, backend) -> None:
    """A graph of our functions as leaves (or plain ATen): gradients are eager's."""
    fused, plain = _pair()
    fused.train(training)
    plain.train(training)
    traced = _traced(fused)
    _close(_step(traced, X, fused), _step(plain, X))
    text = traced.code
    assert "Function" not in text
    again = copy.deepcopy(traced)
    again.recompile()
    again(X)


def test_fx_functions_are_leaves() -> None:
    """Fusion survives tracing: the graph calls our functions, not a soup of operators."""
    traced = _traced(Everything())
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    names = {getattr(t, "__name__", str(t)) for t in targets}
    assert {"batch_norm_add_batch_norm_act", "add_act", "batch_norm_act_max_pool"} <= names


def test_fx_feature_extraction(backend) -> None:
    """As torchvision's create_feature_extractor: library modules as leaves, an inner node as output, then backward."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(m, qualified_name)

    fused, plain = _pair()
    for tracer in (Tracer(), fx.Tracer()):
        extractor = fx.GraphModule(fused, tracer.trace(fused))
        graph = extractor.graph
        calls = [n for n in graph.nodes if "add_act" in str(n.target) or getattr(n.target, "__name__", "") == "add_act"]
        output = next(n for n in graph.nodes if n.op == "output")
        if calls:
            output.args = (calls[0],)
            graph.eliminate_dead_code()
            extractor.recompile()
        x = X.clone().requires_grad_()
        out = extractor(x)
        got = torch.autograd.grad(out.square().sum(), [x, fused.conv.weight, fused.bn1.weight])
        z = plain.conv(x)
        y = torch.relu(plain.bn1(z))
        z = torch.relu(plain.bn2(z) + y)
        a = nn.functional.batch_norm(z, *plain._stats(plain.bn3), True)
        z = torch.relu(a + nn.functional.batch_norm(y, *plain._stats(plain.bn4), True))
        want_out = torch.relu(z + y)
        if not calls:
            pytest.fail("add_act is not a node of the graph")
        want = torch.autograd.grad(want_out.square().sum(), [x, plain.conv.weight, plain.bn1.weight])
        _close([out.detach(), *got], [want_out.detach(), *want])


def test_make_fx(backend) -> None:
    """A dispatcher-level trace under autograd: the recorded backward has gradients in it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    weight, bias = torch.rand(3) + 0.5, torch.randn(3)

    def f(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        x, w, b = (t.detach().requires_grad_() for t in (x, w, b))
        out = F.batch_norm_act(x, None, None, w, b, x, training=True)
        return torch.autograd.grad(out.square().sum(), (x, w, b))

    got = make_fx(f)(X, weight, bias)(X, weight, bias)
    x, w, b = (t.detach().requires_grad_() for t in (X, weight, bias))
    want = torch.autograd.grad(
        torch.relu(nn.functional.batch_norm(x, None, None, w, b, True) + x).square().sum(), (x, w, b)
    )
    _close(list(got), list(want))


# --- TorchScript ---


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_jit_trace(training, backend) -> None:
    """A traced model's gradients: a tracer that steps through Function.apply would lose them without a word."""
    fused, plain = _pair()
    fused.train(training)
    plain.train(training)
    initial = copy.deepcopy(fused.state_dict())
    traced = torch.jit.trace(fused, X, check_trace=False)
    fused.load_state_dict(initial)
    _close(_step(traced, X), _step(plain, X))
    for x in (X[:3], X * 2):
        _close(_step(traced, x), _step(plain, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_jit_trace_saves_and_freezes(tmp_path) -> None:
    fused, plain = _pair()
    traced = torch.jit.trace(fused.eval(), X)
    traced.save(tmp_path / "m.pt")
    want = plain.eval()(X)
    torch.testing.assert_close(torch.jit.load(tmp_path / "m.pt")(X), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.jit.optimize_for_inference(traced)(X), want, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_jit_script(residual, backend) -> None:
    """Scripts, with eager's gradients; or refuses in words."""
    module = fusedres.BatchNormAct2d(3)
    try:
        scripted = torch.jit.script(module)
    except Exception as error:
        assert str(error)  # noqa: PT017
        pytest.skip(f"does not script: {str(error).splitlines()[0]}")
    plain = nn.BatchNorm2d(3)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    mine = scripted(x, x) if residual else scripted(x)
    theirs = torch.relu(plain(y) + y) if residual else torch.relu(plain(y))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scripted.weight.grad, plain.weight.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scripted.running_mean, plain.running_mean)


# --- other devices and subclasses ---


def test_meta_device() -> None:
    """Shape inference without data, as eager."""
    module = fusedres.BatchNormAct2d(3, device="meta")
    out = module(torch.empty(2, 3, 5, 5, device="meta", requires_grad=True))
    assert out.shape == (2, 3, 5, 5)
    assert out.is_meta
    out.sum().backward()


def test_fake_tensors(main_call, backend) -> None:
    """Under FakeTensorMode the result has the true result's shape, dtype and strides."""
    from torch._subclasses import FakeTensorMode

    tensors = main_call.tensors(torch.float32)
    values = [tensors[n] for n in main_call.names(tensors)]
    real = main_call.function("ours", tensors)(*values)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {n: mode.from_tensor(t) for n, t in tensors.items()}
        fake = main_call.ours(fakes)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_tensor_subclass_and_torch_function_mode(backend) -> None:
    """A Tensor subclass that only overrides __torch_function__ passes through, with values and gradients."""

    class Tagged(torch.Tensor):
        pass

    x = X.clone().as_subclass(Tagged).requires_grad_()
    plain = X.clone().requires_grad_()
    module, theirs = fusedres.BatchNormAct2d(3), nn.BatchNorm2d(3)
    out = module(x)
    want = torch.relu(theirs(plain))
    torch.testing.assert_close(out.as_subclass(torch.Tensor), want, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad(want.square().sum(), plain)
    torch.testing.assert_close(gradient.as_subclass(torch.Tensor), wanted, rtol=1e-3, atol=1e-3)


def test_parametrization_and_weight_of_a_view(backend) -> None:
    """weight computed by a parametrization: gradients reach the original."""
    module = fusedres.BatchNormAct2d(3, act=None)

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    torch.nn.utils.parametrize.register_parametrization(module, "weight", Double())
    module(X).square().sum().backward()
    assert module.parametrizations.weight.original.grad is not None
    assert module.parametrizations.weight.original.grad.abs().sum() > 0
