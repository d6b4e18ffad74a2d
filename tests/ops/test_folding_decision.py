"""Whether a fold is exact enough: looked at, kept with the module, and done alike where nobody can look."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import Bottleneck, ConvBNAct2d
from fusedres import functional as F
from fusedres.nn.norm import folding_decision
from fusedres.ops import folded_call, folding
from fusedres.ops.folding import FoldingDecision

CHANNELS_LAST = torch.channels_last
LOOK_AGAIN = 256


@pytest.fixture(params=["auto", "reference"])
def served(request: pytest.FixtureRequest):
    """What serves by default, and the specification."""
    with fusedres.use_backend(request.param):
        yield request.param


@pytest.fixture
def moments_in(record_ops):
    """A function that runs `call()` and returns how often the moments of a convolution's input were computed."""

    def count(call) -> int:
        with record_ops() as record:
            call()
        return sum("conv1x1_moments" in str(func) for func, *_ in record.calls)

    return count


def easy(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4, 16, 8, 8), generator=g).to(dtype).contiguous(memory_format=CHANNELS_LAST)


def hard(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Channels that differ by a thousandth: what is left of them after weights that sum to zero is rounding."""
    x = easy(*shape, dtype=torch.float32)
    return (x[:, :1] + 0.001 * x + 3).to(dtype).contiguous(memory_format=CHANNELS_LAST)


def a_weight(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    w = torch.randn(32, 16, 1, 1, generator=torch.Generator().manual_seed(1))
    return (w - w.mean(1, keepdim=True)).to(dtype).requires_grad_()


def call(y: Tensor, decision: FoldingDecision | None, w: Tensor | None = None) -> Tensor:
    w = a_weight(y.dtype) if w is None else w
    return F.conv1x1_bn_act(y, w, None, None, training=True, folding="always", decision=decision)


def a_block(dtype: torch.dtype = torch.bfloat16, is_hard: bool = False, shortcut: bool = False) -> Bottleneck:
    """With `is_hard`, one whose last convolution does not fold; `ease` makes it one that does."""
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64)) if shortcut else None
    block = Bottleneck(64, 16, downsample=downsample)
    block.folding = "always"
    with torch.no_grad():
        block.conv3.weight -= block.conv3.weight.mean(1, keepdim=True)
        block.bn2.bias.fill_(1000.0 if is_hard else 0.0)
    return block.to(dtype)


def ease(block: Bottleneck) -> None:
    with torch.no_grad():
        block.bn2.bias.zero_()


def is_one_node(out: Tensor) -> bool:
    return type(out.grad_fn).__name__ == "FoldedBottleneckFunctionBackward"


# --- the decision itself ----------------------------------------------------------------------------------------------


def test_a_new_decision_knows_nothing() -> None:
    decision = FoldingDecision()
    assert decision.safe is None
    assert decision.why == "not looked at yet"
    assert decision.known(easy()) is None


def ask(decision: FoldingDecision, y: Tensor) -> bool | None:
    """As a call does."""
    known = decision.known(y)
    decision.asked(y, known)
    return known


def test_on_a_cpu_every_call_looks_but_after_a_refusal() -> None:
    decision, y = FoldingDecision(), easy()
    for _ in range(3):
        assert ask(decision, y) is None
        decision.found(True, "exact enough", y)
    assert ask(decision, y) is None
    decision.found(False, "rounding", y)
    assert (decision.safe, decision.why) == (False, "rounding")
    assert [ask(decision, y) for _ in range(LOOK_AGAIN)] == [False] * LOOK_AGAIN
    assert ask(decision, y) is None
    decision.found(False, "still", y)
    assert ask(decision, y) is False


def test_elsewhere_a_safe_one_is_kept_too() -> None:
    decision, y = FoldingDecision(), torch.empty(4, 16, 8, 8, device="meta")
    decision.found(True, "exact enough", y)
    assert [ask(decision, y) for _ in range(LOOK_AGAIN)] == [True] * LOOK_AGAIN
    assert ask(decision, y) is None


def in_backward_of_a_checkpoint(function) -> list:
    found = []
    x = torch.ones(1, requires_grad=True)
    out = x * 1
    out.register_hook(lambda grad: found.append(function()))
    out.backward()
    return found


@pytest.mark.parametrize("safe", [None, True, False])
def test_in_backward_as_decided(safe) -> None:
    decision, y = FoldingDecision(), easy()
    ask(decision, y)
    if safe is not None:
        decision.found(safe, "", y)
    assert in_backward_of_a_checkpoint(lambda: decision.known(y)) == [safe]


def test_in_backward_as_decided_for_that_call() -> None:
    """Of several whose inputs differ; and what backward asks counts for nothing."""
    decision, calls = FoldingDecision(), [easy(seed=seed) for seed in range(3)]
    for y, safe in zip(calls, (True, False, None), strict=True):
        assert ask(decision, y) is (None if safe is not None else False)
        if safe is not None:
            decision.found(safe, "", y)
    for y, safe in zip(calls, (True, False, False), strict=True):
        assert in_backward_of_a_checkpoint(lambda y=y: ask(decision, y)) == [safe]
    assert [ask(decision, calls[1]) for _ in range(LOOK_AGAIN - 1)] == [False] * (LOOK_AGAIN - 1)
    assert ask(decision, calls[1]) is None


@pytest.mark.parametrize("safe", [None, True, False])
def test_blind_calls_fold_only_what_is_known_to_be_safe(safe) -> None:
    decision = FoldingDecision()
    if safe is not None:
        decision.found(safe, "", easy())
    with torch._subclasses.FakeTensorMode():
        assert decision.known(torch.empty(4, 16, 8, 8)) is (safe is True)


def test_copies_decide_for_themselves(served) -> None:
    block = a_block(is_hard=True)
    block(easy(4, 64, 8, 8))
    assert block._folding_decision.safe is False
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        ease(other)
        y = easy(4, 64, 8, 8)
        folding_decision(other).found(True, "other values", y)
        assert is_one_node(other(y))
        assert block._folding_decision.safe is False


def test_not_in_the_state_dict(served) -> None:
    block = a_block()
    keys = list(block.state_dict())
    block(easy(4, 64, 8, 8))
    assert block._folding_decision.safe is True
    assert block._folding_decision.why == "exact enough"
    assert list(block.state_dict()) == keys
    assert not [name for name, _ in block.named_modules() if "decision" in name]


# --- one convolution --------------------------------------------------------------------------------------------------


def test_every_call_looks_without_a_decision(served, moments_in) -> None:
    assert [moments_in(lambda: call(hard(), None)) for _ in range(3)] == [1, 1, 1]


def test_refused_calls_look_at_every_256th(served, moments_in) -> None:
    decision = FoldingDecision()
    assert moments_in(lambda: call(hard(), decision)) == 1
    assert decision.safe is False
    assert "above" in decision.why
    y, w = easy(), a_weight()
    looked = [moments_in(lambda: call(y, decision, w)) for _ in range(LOOK_AGAIN + 2)]
    assert looked[:LOOK_AGAIN] == [0] * LOOK_AGAIN
    assert looked[LOOK_AGAIN:] == [1, 1]  # safe by now
    assert decision.safe is True


def test_still_refused_waits_again(served, moments_in) -> None:
    decision, y, w = FoldingDecision(), hard(4, 16, 6, 6), a_weight()
    looked = [moments_in(lambda: call(y, decision, w)) for _ in range(2 * LOOK_AGAIN + 3)]
    assert [i for i, n in enumerate(looked) if n] == [0, LOOK_AGAIN + 1, 2 * LOOK_AGAIN + 2]


@pytest.mark.parametrize("data", [easy, hard])
def test_same_numbers_whoever_decides(data, served) -> None:
    y, w = data(), a_weight()
    decision, results = FoldingDecision(), []
    for d in (None, decision, decision):
        out = call(y, d, w)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), w)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_a_module_keeps_one(served, moments_in) -> None:
    module = ConvBNAct2d(16, 32, 1).bfloat16()
    module.folding = "always"
    with torch.no_grad():
        module.conv.weight.copy_(a_weight())
    assert [moments_in(lambda: module(hard())) for _ in range(4)] == [1, 0, 0, 0]
    assert module._folding_decision.safe is False


# --- a block ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", [False, True])
def test_a_refused_block_computes_no_moments(shortcut, served, moments_in) -> None:
    block, x = a_block(is_hard=True, shortcut=shortcut), easy(4, 64, 8, 8)
    looked = [moments_in(lambda: block(x)) for _ in range(5)]
    assert looked[0] >= 1
    assert looked[1:] == [0] * 4
    assert block._folding_decision.safe is False
    assert block.bn1.num_batches_tracked == block.bn3.num_batches_tracked == 5


def test_a_refused_block_looks_after_256_calls(served, moments_in) -> None:
    block, x = a_block(is_hard=True), easy(1, 64, 8, 8)
    assert moments_in(lambda: block(x)) == 1
    ease(block)
    looked = [moments_in(lambda: block(x)) for _ in range(LOOK_AGAIN + 2)]
    assert [i for i, n in enumerate(looked) if n] == [LOOK_AGAIN, LOOK_AGAIN + 1]
    assert block._folding_decision.safe is True
    assert is_one_node(block(x))


def test_a_block_that_turns_bad_is_refused_at_once(served) -> None:
    block, x = a_block(), easy(4, 64, 8, 8)
    assert is_one_node(block(x))
    with torch.no_grad():
        block.bn2.bias.fill_(1000.0)
    assert not is_one_node(block(x))
    assert block._folding_decision.safe is False


def test_evaluation_and_never_leave_the_decision(served) -> None:
    block, x = a_block(), easy(4, 64, 8, 8)
    block.eval()(x)
    block.train().folding = "never"
    block(x)
    decision = getattr(block, "_folding_decision", None)
    assert decision is None or decision.safe is None


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("decided", [True, False])
def test_recomputation_does_as_was_decided(decided, reentrant, served, monkeypatch, record_ops) -> None:
    """Although a look would now say otherwise."""
    block = a_block(is_hard=not decided)
    x = easy(4, 64, 8, 8).requires_grad_()
    twin = copy.deepcopy(block)
    out = checkpoint(block, x, use_reentrant=reentrant)
    assert block._folding_decision.safe is decided
    looks = []
    monkeypatch.setattr(
        folded_call, "numerically_safe", lambda *args, **kwargs: (looks.append(1), (not decided, "changed"))[1]
    )
    with record_ops() as record:
        out.float().square().sum().backward()
    monkeypatch.undo()
    names = [str(func) for func, *_ in record.calls]
    assert any("conv1x1_bn_act_apply" in name for name in names) == decided
    assert not looks
    assert block._folding_decision.safe is decided
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    twin(leaf).float().square().sum().backward()
    assert torch.equal(x.grad, leaf.grad)
    for a, b in zip(block.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_an_earlier_call(reentrant, served, monkeypatch, record_ops) -> None:
    """As that call was decided, although the next one was decided otherwise."""
    block, xs, outs = a_block(), [easy(4, 64, 8, 8, seed=seed).requires_grad_() for seed in range(2)], []
    for x, safe in zip(xs, (True, False), strict=True):
        monkeypatch.setattr(folded_call, "numerically_safe", lambda *a, safe=safe, **k: (safe, "asked"))
        outs.append(checkpoint(block, x, use_reentrant=reentrant))
    for out, safe in zip(outs, (True, False), strict=True):
        with record_ops() as record:
            out.float().square().sum().backward()
        assert any("conv1x1_bn_act_apply" in str(func) for func, *_ in record.calls) == safe


@pytest.mark.parametrize("is_hard", [False, True])
def test_resumed_runs_take_the_same_steps(is_hard, served) -> None:
    """A module read from a state_dict decides anew, from the same values, and computes the same bits."""
    block = a_block(is_hard=is_hard)
    for seed in range(3):
        block(easy(4, 64, 8, 8, seed=seed))
    resumed = a_block()
    resumed.load_state_dict(block.state_dict())
    x = easy(4, 64, 8, 8, seed=5)
    outs = [module(x) for module in (block, resumed)]
    assert torch.equal(*outs)
    assert is_one_node(outs[0]) == is_one_node(outs[1]) != is_hard
    assert resumed._folding_decision.safe is not is_hard


# --- graphs -----------------------------------------------------------------------------------------------------------


def _compiled(module: nn.Module, x: Tensor) -> tuple[str, Tensor]:
    """The graph of its forward, and what it computes."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    out = torch.compile(module, fullgraph=True, backend=backend)(x)
    assert len(graphs) == 1
    return graphs[0], out


@pytest.mark.parametrize("before", ["nothing", "safe", "refused"])
def test_compiled_folds_what_is_known_to_be_safe(before, served) -> None:
    """A bfloat16 block, called eagerly before, or not."""
    block, x = a_block(is_hard=before == "refused"), easy(4, 64, 8, 8)
    if before != "nothing":
        block(x)
    want = copy.deepcopy(block)(x)
    kept = getattr(block, "_folding_decision", None)
    state = None if kept is None else (kept.safe, kept.why)
    graph, out = _compiled(block, x)
    assert ("conv1x1_moments" in graph) == (before == "safe")
    torch.testing.assert_close(out, want, rtol=3e-2, atol=3e-2)
    kept = getattr(block, "_folding_decision", None)
    assert (None if kept is None else (kept.safe, kept.why)) in (state, (None, "not looked at yet"))


def test_compiled_folds_what_is_safe_unseen(served) -> None:
    block, x = a_block(torch.float32), easy(4, 64, 8, 8, dtype=torch.float32)
    sums = "float64" if served == "reference" else "shifted"
    graph, out = _compiled(block, x)
    assert ("conv1x1_moments" in graph) == folding.safe_unseen(torch.float32, sums)
    torch.testing.assert_close(out, copy.deepcopy(block)(x), rtol=1e-4, atol=1e-4)


def test_exported_programs_do_not_fold(served) -> None:
    block, x = a_block(torch.float32), easy(4, 64, 8, 8, dtype=torch.float32)
    block(x)
    program = torch.export.export(copy.deepcopy(block), (x,))
    assert "conv1x1" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-4)
