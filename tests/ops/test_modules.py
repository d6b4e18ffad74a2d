"""BatchNormAct2d as a module: it is an nn.BatchNorm2d in every respect that users rely on."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fusedres
from fusedres import functional as F

ARGUMENTS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None, "eps": 1e-3},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_same_state_as_batch_norm_2d(arguments) -> None:
    mine, theirs = fusedres.BatchNormAct2d(5, **arguments), nn.BatchNorm2d(5, **arguments)
    assert isinstance(mine, nn.BatchNorm2d)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in mine.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(mine, name) == getattr(theirs, name)


def test_positional_arguments_are_batch_norm_2ds() -> None:
    mine = fusedres.BatchNormAct2d(5, 1e-3, 0.2, False, True, "cpu", torch.float64)
    assert (mine.eps, mine.momentum, mine.affine, mine.track_running_stats) == (1e-3, 0.2, False, True)
    assert mine.running_mean.dtype == torch.float64


def test_bias_false(backend) -> None:
    module = fusedres.BatchNormAct2d(5, bias=False)
    assert module.bias is None
    assert module.weight is not None
    assert "bias" not in module.state_dict()
    x = torch.randn(3, 5, 6, 7, requires_grad=True)
    torch.testing.assert_close(
        module(x), torch.relu(nn.functional.batch_norm(x, None, None, module.weight, None, True))
    )
    module.reset_parameters()


def test_old_checkpoint_without_counter() -> None:
    """State dicts from before num_batches_tracked (version < 2) load, as in nn.BatchNorm2d."""
    theirs, mine = nn.BatchNorm2d(5), fusedres.BatchNormAct2d(5)
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    mine.load_state_dict(state, strict=True)
    assert mine.num_batches_tracked == 0


def test_repr_names_the_activation() -> None:
    assert "relu" in repr(fusedres.BatchNormAct2d(5))
    assert "5" in repr(fusedres.BatchNormAct2d(5, act=None))
    assert "eps=1e-05" in repr(fusedres.BatchNormAct2d(5))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "save-weights-only"])
def test_copies(how, backend) -> None:
    module = fusedres.BatchNormAct2d(5, eps=0.01, momentum=None)
    x, r = torch.randn(3, 5, 6, 7), torch.randn(3, 5, 6, 7)
    module(x, r)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module if how == "save" else module.state_dict(), buffer)
        buffer.seek(0)
        if how == "save":
            other = torch.load(buffer, weights_only=False)
        else:
            other = fusedres.BatchNormAct2d(5, eps=0.01, momentum=None)
            other.load_state_dict(torch.load(buffer, weights_only=True))
    assert type(other) is fusedres.BatchNormAct2d
    assert torch.equal(module(x, r), other(x, r))
    for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_train_eval_and_track_switches(backend, twins) -> None:
    mine, theirs = twins(5)
    x = torch.randn(4, 5, 6, 7)
    for change in (
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: setattr(m, "momentum", 0.5),
        lambda m: setattr(m, "momentum", None),
        lambda m: setattr(m, "eps", 0.2),
        lambda m: m.reset_running_stats(),
        lambda m: setattr(m, "track_running_stats", False),
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: setattr(m, "track_running_stats", True),
        lambda m: m.reset_parameters(),
        lambda m: m.requires_grad_(False),
        lambda m: m.double() and m.float(),
        lambda m: setattr(m, "weight", None),
    ):
        for module in (mine, theirs):
            change(module)
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)
        for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_counter_removed(backend, twins) -> None:
    """`module.num_batches_tracked = None` is allowed in nn.BatchNorm2d."""
    mine, theirs = twins(5)
    x = torch.randn(4, 5, 6, 7)
    for module in (mine, theirs):
        module.num_batches_tracked = None
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)


def test_hooks_fire(backend) -> None:
    module = fusedres.BatchNormAct2d(5)
    seen = []
    module.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    module.register_forward_hook(lambda m, a, o: seen.append("post"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append(("backward", gi[0] is not None)))
    x = torch.randn(3, 5, 6, 7, requires_grad=True)
    module(x).sum().backward()
    assert seen == ["pre", "post", ("backward", True)]


def test_backward_hook_result_can_be_changed_in_place(backend) -> None:
    """full_backward_hook wraps outputs in views: in-place ReLU after our module is the usual trap."""
    module = nn.Sequential(fusedres.BatchNormAct2d(5, act=None), nn.ReLU(inplace=True))
    plain = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    x = torch.randn(3, 5, 6, 7)
    grads = []
    for m in (module, plain):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_sync_batch_norm_conversion_keeps_parameters() -> None:
    """torch's converter knows us as a BatchNorm: same parameters; the activation is dropped (documented)."""
    module = nn.Sequential(fusedres.BatchNormAct2d(5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(converted[0], nn.SyncBatchNorm)
    assert torch.equal(converted[0].weight, torch.ones(5))


def test_optimizer_and_training_loop(backend) -> None:
    """A few SGD steps give eager's parameters and losses."""
    torch.manual_seed(0)
    fused = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        fusedres.BatchNormAct2d(8),
        nn.Conv2d(8, 4, 3),
        fusedres.BatchNormAct2d(4),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        a.data.copy_(b.data)
    losses = []
    x, y = torch.randn(16, 3, 8, 8), torch.randint(3, (16,))
    for model in (fused, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        curve = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)


def test_shared_memory_and_data_parallel_replicas(backend) -> None:
    module = fusedres.BatchNormAct2d(5)
    module.share_memory()
    module(torch.randn(3, 5, 6, 7))
    assert module.num_batches_tracked == 1


def test_threads(backend) -> None:
    """Concurrent calls from several Python threads do not disturb each other."""
    import threading

    x = torch.randn(8, 16, 20, 20)
    want = F.batch_norm_act(x, torch.zeros(16), torch.ones(16), training=True)
    got: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(20):
            got.append(F.batch_norm_act(x, torch.zeros(16), torch.ones(16), training=True))  # noqa: PERF401

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 80
    assert all(torch.equal(g, want) for g in got)


def test_uninitialized_device_argument() -> None:
    module = fusedres.BatchNormAct2d(5, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.running_var, torch.ones(5))
    module(torch.randn(2, 5, 3, 3))
