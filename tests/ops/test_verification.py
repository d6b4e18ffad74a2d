"""The checker itself: it accepts eager, and it catches what it is there to catch."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from fusedres import verification
from fusedres.verification import Case

SMALL = Case("batch_norm_act", shape=(4, 8, 9, 9), residual="contiguous")


@pytest.mark.parametrize("op", verification.OPS)
def test_eager_passes(op) -> None:
    for case in verification.cases(op, quick=True):
        result = verification.run(case, verification.eager)
        bad = [str(m) for m in verification.compare(case, result, result) if not m.ok]
        assert not bad, (case.name, bad)


def _failing(case: Case, forward) -> list[str]:
    mine, theirs = verification.run(case, forward), verification.run(case, verification.eager)
    return [m.quantity for m in verification.compare(case, mine, theirs) if not m.ok]


def test_biased_variance_is_caught() -> None:
    def forward(case, t):
        other = t | {"running_var": t["running_var"].clone()}
        out = verification.eager(case, other)
        t["running_var"].copy_(other["running_var"] - 0.1 * t["x"].detach().var((0, 2, 3)) / (4 * 81))
        return out

    assert _failing(SMALL, forward) == ["running_var"]


def test_one_pass_variance_is_caught() -> None:
    def forward(case, t):
        x = t["x"]
        mean = x.mean((0, 2, 3), keepdim=True)
        var = x.square().mean((0, 2, 3), keepdim=True) - mean.square()
        y = (x - mean) * (var.clamp(min=0) + case.eps).rsqrt()
        y = y * t["weight"].view(1, -1, 1, 1) + t["bias"].view(1, -1, 1, 1) + t["residual"]
        with torch.no_grad():
            verification.eager(case, t)
        return y.relu()

    assert "out" in _failing(replace(SMALL, distribution="large_mean"), forward)
    assert not _failing(SMALL, forward)


def test_wrong_mask_is_caught() -> None:
    class Leaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.relu()

        @staticmethod
        def backward(ctx, dy):
            (z,) = ctx.saved_tensors
            return dy * (z > -0.01)  # passes a little more than the forward did

    def forward(case, t):
        return Leaky.apply(verification.pre_activation(case, t))

    assert {"dresidual", "dbias"} & set(_failing(SMALL, forward))


def test_wrong_winner_is_caught() -> None:
    case = Case("batch_norm_act_max_pool", shape=(2, 4, 12, 12))

    class Last(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            out, index = torch.nn.functional.max_pool2d(y, 3, 2, 1, return_indices=True)
            ctx.save_for_backward(index)
            ctx.shape = y.shape
            return out

        @staticmethod
        def backward(ctx, dy):
            (index,) = ctx.saved_tensors
            index = (index + 1).clamp(max=143)  # the neighbour
            dx = dy.new_zeros(ctx.shape).flatten(2)
            return dx.scatter_add_(2, index.flatten(2), dy.flatten(2)).view(ctx.shape)

    def forward(case, t):
        return Last.apply(verification.pre_activation(case, t).relu())

    assert _failing(case, forward)


def test_winners_are_read_right() -> None:
    """What is read from eager's gradients is what max_pool2d says."""
    for case in verification.cases("batch_norm_act_max_pool", quick=True):
        result = verification.run(case, verification.eager)
        tensors = verification.make_inputs(case)
        y = verification.pre_activation(case, tensors)
        y = y.relu() if case.act else y
        kernel, stride, padding, dilation, ceil_mode = case.window
        _, index = torch.nn.functional.max_pool2d(y, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
        live = torch.ones_like(index, dtype=torch.bool) if result.mask is None else result.mask
        assert torch.equal(index[live], result.winners[live]), case.name


def test_missing_gradient_and_wrong_dtype_are_caught() -> None:
    assert "dx" in _failing(SMALL, lambda case, t: verification.eager(case, t | {"x": t["x"].detach()}))
    assert "out" in _failing(SMALL, lambda case, t: verification.eager(case, t).double())


def test_nan_is_not_small() -> None:
    def forward(case, t):
        out = verification.eager(case, t)
        return torch.where(torch.arange(9) == 3, float("nan"), out)

    assert "out" in _failing(SMALL, forward)


def test_ulp() -> None:
    assert verification.ulp(torch.float32, 1.0) == 2.0**-23
    assert verification.ulp(torch.float32, 1.999) == 2.0**-23
    assert verification.ulp(torch.bfloat16, 2.0) == 2.0**-6
    assert verification.ulp(torch.float16, 0.0) == 2.0**-24
    assert verification.ulp(torch.float16, 1e-7) == 2.0**-24


def test_pairwise_covers_every_pair() -> None:
    factors = {"a": [1, 2, 3], "b": ["x", "y"], "c": [True, False], "d": [0, 1, 2, 3]}
    rows = verification.pairwise(factors)
    assert len(rows) < 3 * 2 * 2 * 4
    for (a, first), (b, second) in itertools.combinations(factors.items(), 2):
        for pair in itertools.product(first, second):
            assert any((row[a], row[b]) == pair for row in rows)
    assert all(
        row["a"] != 2 or row["c"] for row in verification.pairwise(factors, lambda row: row["a"] != 2 or row["c"])
    )


@pytest.mark.parametrize("op", [*verification.OPS, *verification.BLOCKS])
def test_tables_are_stable_and_named(op) -> None:
    table = verification.cases(op)
    assert len({case.name for case in table}) == len(table)
    verification.cases.cache_clear()
    assert verification.cases(op) == table
    assert 3 * len(verification.cases(op, quick=True)) >= len(table)


def test_layouts_hold_the_values() -> None:
    x = torch.randn(3, 4, 5, 6)
    for layout in verification.LAYOUTS:
        y = verification.lay_out(x, layout)
        assert y.shape == x.shape
        if layout not in ("expanded", "overlapping"):
            assert torch.equal(x, y), layout
    assert verification.lay_out(x, "overlapping").stride()[0] < 4 * 5 * 6
    assert 0 in verification.lay_out(x, "expanded").stride()


def _main(*arguments: str, capsys) -> tuple[int, str, str]:
    import argparse

    from fusedres.cli import verify

    parser = argparse.ArgumentParser()
    verify.add_parser(parser.add_subparsers())
    args = parser.parse_args(["verify", *arguments])
    code = verify.run(args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command(capsys) -> None:
    code, out, _ = _main("--op", "add_act", "--backend", "reference", "--quick", capsys=capsys)
    assert code == 0
    assert "add_act" in out
    assert "FAIL" not in out
    code, out, _ = _main("--op", "add_act", "--backend", "reference", "--quick", "--json", capsys=capsys)
    answer = json.loads(out)
    assert code == 0
    assert answer["ok"] is True
    assert {row["op"] for row in answer["rows"]} == {"add_act"}
    assert all(row["multiple"] <= 2 for row in answer["rows"])


def test_command_fails_when_the_rule_does(capsys, monkeypatch) -> None:
    monkeypatch.setattr(verification, "ours", lambda case, t: verification.eager(case, t) * 1.001)
    code, out, _ = _main("--op", "add_act", "--backend", "reference", "--quick", capsys=capsys)
    assert code == 1
    assert "FAIL" in out
    monkeypatch.setattr(verification, "ours", lambda case, t: 1 / 0)
    code, out, _ = _main("--op", "add_act", "--backend", "reference", "--quick", "--json", capsys=capsys)
    assert code == 1
    assert "ZeroDivisionError" in out


def test_command_refuses_what_is_not_there(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = _main("--backend", "cuda", capsys=capsys)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "cuda" in err
    with pytest.raises(SystemExit):
        _main("--backend", "nonsense", capsys=capsys)


@pytest.mark.parametrize("op", verification.BLOCKS)
def test_blocks(op, any_backend) -> None:
    for case in verification.cases(op, quick=any_backend == "auto"):
        assert not verification.failures(case, any_backend), case.name


def test_pools_forgive_a_lucky_draw_and_no_deficit(monkeypatch) -> None:
    def failures(error: float, eager_error: float, first_eager_error: float, note: str = "") -> list[str]:
        def check(case, *_):
            first = case.seed == 0
            eager = first_eager_error if first else eager_error
            return [verification.Measurement("dx", error, eager, 1.0, note if first else "")]

        monkeypatch.setattr(verification, "check", check)
        return verification.pooled_failures(iter([SMALL]))

    assert not failures(4.0, eager_error=2.0, first_eager_error=1.0)
    assert failures(8.0, eager_error=2.0, first_eager_error=1.0)
    assert failures(4.0, eager_error=2.0, first_eager_error=1.0, note="missing")


def test_seeds_draw_other_values() -> None:
    first, second = (verification.make_inputs(replace(SMALL, seed=seed)) for seed in (0, 1))
    assert replace(SMALL, seed=0).name == SMALL.name != replace(SMALL, seed=1).name
    assert all(not torch.equal(first[name], second[name]) for name in verification.differentiable(first))


def test_float64_terms_that_cancel_are_measured_by_their_size() -> None:
    """dx of 1e-12 from terms of 1e-3; a dx that is wrong in its tenth digit is caught where nothing cancels."""
    case = Case("batch_norm_act", shape=(3, 1, 2, 1), dtype="f64", distribution="saturated", eps=1e-3)
    assert not _failing(case, lambda case, t: verification.eager(case, t) * (1 + 1e-15))
    plain = replace(case, distribution="normal")
    assert "dx" in _failing(plain, lambda case, t: verification.eager(case, t) * (1 + 1e-8))
