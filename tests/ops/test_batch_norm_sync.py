"""The raw ops of synchronised batch norm, in one process: parts of a batch, and sums that are added here.

What processes do with them is in tests/nn/test_sync.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres.ops import batch_norm_sync
from fusedres.ops.layout import is_channels_last, mask_bytes

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-5


def make(channels, parts, dtype, memory_format, area=(5, 7), residual=False, seed=0):
    """x, residual, dy of each part, and weight, bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(seed)

    def tensors():
        for n in parts:
            t = torch.randn(n, channels, *area, generator=generator, dtype=torch.float64) * 1.5 + 0.7
            yield t.to(dtype).contiguous(memory_format=memory_format)

    x, r, dy = list(tensors()), list(tensors()) if residual else [None] * len(parts), list(tensors())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [(torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5).to(wide) for _ in range(4)]
    return x, r, dy, vectors


def run(x, residual, dy, vectors, relu=True, momentum=0.1, counter=None):
    """Everything that the processes of a group would have, each with one part."""
    statistics, apply, reduce, finish = batch_norm_sync.implementations(x[0])
    weight, bias, *running = vectors
    partials = torch.stack([statistics(part) for part in x])
    results = []
    for part, r, g in zip(x, residual, dy, strict=True):
        own = [v.clone() for v in running]
        own_counter = counter.clone() if counter is not None else None
        save_mask = relu and r is not None
        out, stats, mask = apply(part, r, partials, weight, bias, *own, own_counter, momentum, EPS, relu, save_mask)
        mask = mask if save_mask else None
        sums, dweight, dbias = reduce(g, part, weight, bias, stats, mask, relu, True)
        results.append(
            {"out": out, "stats": stats, "mask": mask, "mean": own[0], "var": own[1]}
            | {"counter": own_counter, "sums": sums, "dweight": dweight, "dbias": dbias}
        )
    total = torch.stack([result["sums"] for result in results]).sum(0)
    for part, g, result in zip(x, dy, results, strict=True):
        arguments = (g, part, weight, bias, result["stats"], result["mask"], total, relu)
        result["dx"], result["dresidual"] = finish(*arguments, True, result["mask"] is not None)
    return results


def joined(results, name):
    return torch.cat([result[name] for result in results])


CASES = [
    (channels, parts, dtype, layout, residual)
    for i, channels in enumerate((1, 3, 7, 64, 65, 257))
    for j, parts in enumerate(((2, 3), (4, 0, 1), (0, 3), (1, 1, 1)))
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    for layout in FORMATS
    for residual in (False, True)
    if (i + j + k + residual) % 4 == 0  # each pair of values occurs
]


@pytest.mark.parametrize(
    ("channels", "parts", "dtype", "layout", "residual"), CASES, ids=lambda v: str(v).replace("torch.", "")
)
def test_as_batch_norm_act_of_the_whole(channels, parts, dtype, layout, residual, backend):
    """In all but the last bits: the statistics differ by the order of double sums, below what float32 keeps."""
    x, r, dy, vectors = make(channels, parts, dtype, FORMATS[layout], residual=residual)
    results = run(x, r, dy, vectors)
    whole = torch.cat(x).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    whole_r = torch.cat(r).contiguous(memory_format=FORMATS[layout]).requires_grad_() if residual else None
    weight, bias, mean, var = (v.clone() for v in vectors)
    weight.requires_grad_(), bias.requires_grad_()
    out = fusedres.functional.batch_norm_act(whole, mean, var, weight, bias, whole_r, training=True, eps=EPS)
    out.backward(torch.cat(dy).contiguous(memory_format=FORMATS[layout]))
    # A sum of many products, and an ulp of the largest of them.
    of_sums = 1e-12 if dtype == torch.float64 else 1e-6
    tolerances = {"dweight": of_sums, "dbias": of_sums}
    ours = {name: joined(results, name) for name in ("out", "dx")}
    want = {"out": out, "dx": whole.grad}
    if residual:
        ours["dresidual"], want["dresidual"] = joined(results, "dresidual"), whole_r.grad
    for name, sums in (("dweight", weight.grad), ("dbias", bias.grad)):
        ours[name], want[name] = sum(result[name].double() for result in results), sums.double()
    for name, value in ours.items():
        tolerance = tolerances.get(name, 1e-13 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(value, want[name].detach(), rtol=tolerance, atol=4 * tolerance)
    for result in results:
        assert torch.equal(result["stats"], results[0]["stats"])
        torch.testing.assert_close(result["mean"], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result["var"], var, rtol=1e-6, atol=1e-6)
    for part, result in zip(x, results, strict=True):
        assert result["out"].stride() == part.stride()
        assert result["dx"].stride() == part.stride()
        if residual:
            assert result["mask"].numel() == mask_bytes(part)


def test_statistics(backend):
    """mean, M2 and count in float64 themselves; for a large mean too."""
    statistics = batch_norm_sync.implementations(torch.empty(1))[0]
    for layout in FORMATS.values():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = (torch.randn(4, 5, 9, 7, dtype=torch.float64) + 1e4).to(dtype).contiguous(memory_format=layout)
            got = statistics(x)
            assert got.dtype == torch.float64
            flat = x.double().transpose(0, 1).flatten(1)
            tolerance = 1e-13 if dtype == torch.float64 else 1e-9
            torch.testing.assert_close(got[:5], flat.mean(1), rtol=tolerance, atol=0)
            m2 = flat.var(1, correction=0) * flat.size(1)
            torch.testing.assert_close(got[5:10], m2, rtol=1e-5 if dtype != torch.float64 else 1e-9, atol=1e-6)
            assert got[10] == flat.size(1)


def test_statistics_of_nothing(backend):
    statistics = batch_norm_sync.implementations(torch.empty(1))[0]
    for x in (torch.randn(0, 5, 3, 3), torch.randn(2, 5, 0, 3), torch.randn(3, 5, 4, 6)[0:0, :, ::2, ::3]):
        assert torch.equal(statistics(x), torch.zeros(11, dtype=torch.float64))


def test_the_parts_may_be_cut_anywhere(backend):
    """The same batch in one part and in many: the same statistics to 1e-12, running statistics to the last bits."""
    x, r, dy, vectors = make(7, (6,), torch.float64, torch.channels_last)
    whole = run(x, r, dy, vectors)[0]
    cut = [t.split([1, 0, 3, 2]) for t in (x[0], dy[0])]
    parts = run(cut[0], [None] * 4, cut[1], vectors)
    torch.testing.assert_close(parts[1]["stats"], whole["stats"], rtol=1e-12, atol=1e-12)
    for name in ("out", "dx"):
        torch.testing.assert_close(joined(parts, name), whole[name], rtol=1e-12, atol=1e-12)


def test_running_statistics(backend):
    """momentum=None averages over the counter; fewer than two values in all move nothing but the counter."""
    x, r, dy, vectors = make(3, (2, 1), torch.float32, torch.contiguous_format)
    counter = torch.tensor(3)
    for result in run(x, r, dy, vectors, momentum=None, counter=counter):
        assert result["counter"] == 4
        flat = torch.cat(x).double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(result["mean"], (vectors[2] * 0.75 + flat.mean(1) * 0.25).float())
        torch.testing.assert_close(result["var"], (vectors[3] * 0.75 + flat.var(1) * 0.25).float())
    for parts in ((1, 0), (0, 0)):
        x, r, dy, vectors = make(3, parts, torch.float32, torch.contiguous_format, area=(1, 1))
        for result in run(x, r, dy, vectors, counter=counter):
            assert result["counter"] == 4
            assert torch.equal(result["mean"], vectors[2])
            assert torch.equal(result["var"], vectors[3])
            assert torch.equal(result["out"], vectors[1].view(1, 3, 1, 1)[: result["out"].size(0)])


def test_constant_channels_are_exact(backend):
    """Parts that agree in their mean: not a bit of variance, and the bias itself comes out."""
    x = [torch.full((n, 3, 4, 4), 1234.567) for n in (3, 2, 5)]
    weight, bias = torch.full((3,), 2.0), torch.full((3,), 0.25)
    for result in run(x, [None] * 3, x, [weight, bias, torch.zeros(3), torch.ones(3)]):
        assert torch.equal(result["out"], torch.full_like(result["out"], 0.25))
        assert torch.equal(result["var"], torch.full((3,), 0.9))


def test_not_finite(backend):
    """As eager: a channel with an infinity or a NaN is NaN, its mean is not, and the others are untouched."""
    x, r, dy, vectors = make(5, (2, 2), torch.float32, torch.channels_last)
    clean = run(x, r, dy, vectors)
    x[1][0, 2, 1, 1] = float("inf")
    x[0][1, 3, 2, 2] = float("nan")
    for result, before in zip(run(x, r, dy, vectors), clean, strict=True):
        assert result["mean"][2] == float("inf")
        assert result["mean"][3].isnan()
        assert result["out"][:, 2:4].isnan().all()
        assert result["dx"][:, 2:4].isnan().all()
        for c in (0, 1, 4):
            assert torch.equal(result["out"][:, c], before["out"][:, c])
            assert torch.equal(result["dx"][:, c], before["dx"][:, c])


@pytest.mark.parametrize("layout", FORMATS)
def test_bits_do_not_depend_on_run_or_threads(layout, backend):
    x, r, dy, vectors = make(40, (3, 2), torch.float32, FORMATS[layout], area=(33, 31), residual=True)
    first = run(x, r, dy, vectors)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for a, b in zip(first, run(x, r, dy, vectors), strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a if a[name] is not None)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("empty", [False, True], ids=["", "empty"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_opcheck(layout, empty, residual, backend, record_ops):
    """Schema, mutation annotations and fake kernels, with and without what is optional."""
    x, r, dy, vectors = make(5, (0 if empty else 2, 1), torch.float32, FORMATS[layout], residual=residual)
    calls = []

    class Record(record_ops):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fusedres":
                calls.append((func, tuple(a.clone() if isinstance(a, Tensor) else a for a in args)))
            return func(*args, **(kwargs or {}))

    with Record():
        run(x[:1], r[:1], dy[:1], vectors, counter=torch.tensor(1))
    assert len(calls) == 4
    for op, args in calls:
        torch.library.opcheck(op, args)
    finish, args = calls[-1]
    for need_dx, need_dresidual in ((True, False), (False, True), (False, False)):
        torch.library.opcheck(finish, (*args[:-2], need_dx, need_dresidual))
    reduce, args = calls[-2]
    torch.library.opcheck(reduce, (*args[:-1], False))
    apply, args = calls[1]
    torch.library.opcheck(apply, (*args[:3], None, None, None, None, None, 0.1, EPS, True, False))


def test_dresidual_alone(backend):
    """Without dx the sums are not looked at."""
    x, r, dy, vectors = make(7, (3,), torch.float32, torch.channels_last, residual=True)
    finish = batch_norm_sync.implementations(x[0])[3]
    result = run(x, r, dy, vectors)[0]
    none = torch.empty(0, dtype=torch.float64)
    dx, dresidual = finish(dy[0], x[0], *vectors[:2], result["stats"], result["mask"], none, True, False, True)
    assert dx.numel() == 0
    assert torch.equal(dresidual, result["dresidual"])


def test_outputs_are_fully_written(backend):
    """Fresh memory holds NaN: an element that a kernel skips would keep it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for layout in FORMATS.values():
            x, r, dy, vectors = make(19, (2, 0, 1), torch.float32, layout, residual=True)
            for result in run(x, r, dy, vectors):
                for name, value in result.items():
                    assert value is None or not value.is_floating_point() or value.isfinite().all(), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_raw_ops_refuse(backend):
    """The native ops guard memory; nothing is updated then. (The reference lets ATen complain.)"""
    if backend != "cpu":
        pytest.skip("the C++ checks")
    statistics, apply, reduce, finish = batch_norm_sync.implementations(torch.empty(1))
    x, _, dy, vectors = make(5, (3,), torch.float32, torch.contiguous_format)
    x, dy = x[0], dy[0]
    partials = statistics(x)[None]
    weight, bias, mean, var = vectors
    counter = torch.tensor(0)
    stats = apply(x, None, partials, weight, bias, None, None, None, 0.1, EPS, True, False)[1]
    sums = reduce(dy, x, weight, bias, stats, None, True, True)[0]
    before = [mean.clone(), var.clone()]

    def applied(**changed):
        arguments = {"x": x, "residual": None, "partials": partials, "weight": weight, "bias": bias}
        arguments |= {"mean": mean, "var": var, "counter": counter, "momentum": 0.1, "eps": EPS}
        apply(*(arguments | {"relu": True, "save_mask": False} | changed).values())

    for changed in (
        {"x": x[0]},
        {"x": x[..., ::2]},
        {"residual": x[:, :, 1:]},
        {"residual": x.double()},
        {"partials": partials[0]},
        {"partials": partials.float()},
        {"partials": partials[:, 1:]},
        {"partials": partials[:0]},
        {"partials": torch.randn(2, 22, dtype=torch.float64)[:, ::2]},
        {"weight": weight[1:]},
        {"weight": weight.double()},
        {"var": None},
        {"counter": torch.zeros(2, dtype=torch.int64)},
        {"counter": torch.zeros(1)},
        {"counter": None, "momentum": None},
        {"eps": 0.0},
        {"save_mask": True},
    ):
        with pytest.raises(RuntimeError):
            applied(**changed)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert counter == 0
    for bad in ((x[0],), (x[..., ::2],), (x.long(),)):
        with pytest.raises(RuntimeError):
            statistics(*bad)
    mask = torch.empty(mask_bytes(x) - 1, dtype=torch.uint8)
    for bad in (
        (dy[1:], x, weight, bias, stats, None),
        (dy, x, weight[1:], bias, stats, None),
        (dy, x, weight, bias, stats[:, 1:], None),
        (dy, x, weight, bias, stats.double(), None),
        (dy, x, weight, bias, stats, mask),
    ):
        with pytest.raises(RuntimeError):
            reduce(*bad, True, True)
        with pytest.raises(RuntimeError):
            finish(*bad, sums, True, True, False)
    for bad in (sums[1:], sums.float(), sums[None]):
        with pytest.raises(RuntimeError):
            finish(dy, x, weight, bias, stats, None, bad, True, True, False)
    assert not is_channels_last(x)
