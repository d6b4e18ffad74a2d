"""The CUDA kernels of synchronised batch norm, run on the CPU: all processes in one, against the reference."""

from __future__ import annotations

import pytest
import torch

import fusedres  # noqa: F401 (declares the ops)

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-5


@pytest.fixture(scope="module")
def ops(host_cuda_ops):
    return host_cuda_ops("batch_norm_act")


class Reference:
    def __getattr__(self, name):
        return getattr(torch.ops.fusedres, f"{name}_reference")


def make(channels, parts, dtype, layout, area=(5, 7), residual=False, mean=0.5):
    """x, residual and dy of each part; weight, bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(channels)

    def tensors(mean=0.3):
        for n in parts:
            t = torch.randn(n, channels, *area, generator=generator, dtype=torch.float64) * 1.5 + mean
            yield t.to(dtype).contiguous(memory_format=FORMATS[layout])

    x, r, dy = list(tensors(mean)), list(tensors()) if residual else [None] * len(parts), list(tensors())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [(torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5).to(wide) for _ in range(4)]
    return x, r, dy, vectors


def run(ops, x, residual, dy, vectors, relu=True, momentum=0.1, counter=None, like=None):
    """What each process has in the end. With ``like``, masks and statistics are those, so that both sides cut alike."""
    weight, bias, *running = vectors
    partials = torch.stack([ops.batch_norm_statistics(part) for part in x])
    results = []
    for i, (part, r, g) in enumerate(zip(x, residual, dy, strict=True)):
        own = [v.clone() if v is not None else None for v in running]
        own_counter = counter.clone() if counter is not None else None
        save_mask = relu and r is not None
        out, stats, mask = ops.batch_norm_act_apply(
            part, r, partials, weight, bias, *own, own_counter, momentum, EPS, relu, save_mask
        )
        kept = (mask if save_mask else None, stats) if like is None else (like[i]["kept_mask"], like[i]["stats"])
        sums, dweight, dbias = ops.batch_norm_act_backward_reduce(g, part, weight, bias, kept[1], kept[0], relu, True)
        results.append({"out": out, "stats": stats, "mask": mask, "kept_mask": kept[0], "partial": partials[i]})
        results[-1] |= {"running_mean": own[0], "running_var": own[1], "counter": own_counter}
        results[-1] |= {"sums": sums, "dweight": dweight, "dbias": dbias}
    total = torch.stack([result["sums"] for result in results]).sum(0)
    for i, (part, g, result) in enumerate(zip(x, dy, results, strict=True)):
        stats = result["stats"] if like is None else like[i]["stats"]
        arguments = (g, part, weight, bias, stats, result["kept_mask"], total, relu, True, residual[i] is not None)
        result["dx"], result["dresidual"] = ops.batch_norm_act_backward_apply(*arguments)
    return results


def compare(got, want, dtype):
    """Rounded once, from float32 sums of the last bits: within a few ulp of the reference."""
    ulp = torch.finfo(dtype).eps
    for ours, theirs in zip(got, want, strict=True):
        for name, value in ours.items():
            exact = theirs[name]
            if value is None or name in ("mask", "kept_mask"):
                continue
            assert value.dtype == exact.dtype, name
            assert value.stride() == exact.stride(), name
            wide = 1e-12 if dtype == torch.float64 else 3e-6
            tolerance = 4 * ulp if name in ("out", "dx", "dresidual") else wide
            scale = exact.double().abs().max().item() if exact.numel() else 1.0
            torch.testing.assert_close(value.double(), exact.double(), rtol=tolerance, atol=tolerance * max(scale, 1.0))


CASES = [
    (channels, parts, dtype, layout, residual)
    for i, channels in enumerate((1, 3, 8, 33, 64))
    for j, parts in enumerate(((2, 3), (4, 0, 1), (0, 2)))
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    for layout in FORMATS
    for residual in (False, True)
    if (i + j + k + residual) % 4 == 0
]


@pytest.mark.parametrize(
    ("channels", "parts", "dtype", "layout", "residual"), CASES, ids=lambda v: str(v).replace("torch.", "")
)
def test_as_the_reference(ops, channels, parts, dtype, layout, residual):
    inputs = make(channels, parts, dtype, layout, residual=residual)
    got = run(ops, *inputs, counter=torch.tensor(4))
    want = run(Reference(), *inputs, counter=torch.tensor(4), like=got)
    compare(got, want, dtype)


@pytest.mark.parametrize("layout", FORMATS)
def test_several_blocks_and_a_large_mean(ops, layout):
    """Many chunks per channel; means of 1e4 cost no accuracy."""
    inputs = make(40, (3, 2), torch.float32, layout, area=(24, 30), residual=True, mean=1e4)
    got = run(ops, *inputs)
    compare(got, run(Reference(), *inputs, like=got), torch.float32)
    for result, want in zip(got, run(Reference(), *inputs), strict=True):
        mean, exact = (r["stats"][0].double() + r["stats"][2].double() for r in (result, want))
        assert (mean - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"relu": False},
        {"momentum": None, "counter": torch.tensor(6)},
        {"momentum": 0.0},
        {"vectors": "none"},
        {"vectors": "weight"},
    ],
    ids=str,
)
def test_options(ops, options):
    x, r, dy, vectors = make(300, (2, 1), torch.float32, "channels_last", area=(2, 3))
    options = dict(options)
    kept = options.pop("vectors", None)
    if kept is not None:
        vectors = [vectors[0] if kept == "weight" else None, None, None, None]
    got = run(ops, x, r, dy, vectors, **options)
    compare(got, run(Reference(), x, r, dy, vectors, **options, like=got), torch.float32)


def test_too_little_for_a_variance(ops):
    for parts in ((1, 0), (0, 0)):
        x, r, dy, vectors = make(5, parts, torch.float32, "contiguous", area=(1, 1))
        for result in run(ops, x, r, dy, vectors, counter=torch.tensor(4)):
            assert torch.equal(result["running_mean"], vectors[2])
            assert torch.equal(result["running_var"], vectors[3])
            assert result["counter"] == 5
            assert torch.equal(result["out"], vectors[1].view(1, 5, 1, 1)[: result["out"].size(0)])


def test_not_finite(ops):
    x, r, dy, vectors = make(5, (2, 2), torch.float32, "channels_last")
    x[1][0, 2, 1, 1] = float("inf")
    x[0][1, 3, 2, 2] = float("nan")
    for result in run(ops, x, r, dy, vectors):
        assert result["running_mean"][2] == float("inf")
        assert result["running_mean"][3].isnan()
        assert result["out"][:, 2:4].isnan().all()
        assert result["dx"][:, 2:4].isnan().all()
        assert result["out"][:, [0, 1, 4]].isfinite().all()
        assert result["dx"][:, [0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("layout", FORMATS)
def test_same_bits_in_every_order(ops, layout, in_every_order):
    inputs = make(13, (2, 1), torch.float32, layout, area=(9, 8), residual=True)

    def results():
        return [v for result in run(ops, *inputs, counter=torch.tensor(1)) for v in result.values()]

    in_every_order(results)


def test_dresidual_alone(ops):
    x, r, dy, vectors = make(7, (3,), torch.float32, "channels_last", residual=True)
    result = run(ops, x, r, dy, vectors)[0]
    none = torch.empty(0, dtype=torch.float64)
    saved = (dy[0], x[0], *vectors[:2], result["stats"], result["mask"])
    dx, dresidual = ops.batch_norm_act_backward_apply(*saved, none, True, False, True)
    assert dx.numel() == 0
    assert torch.equal(dresidual, result["dresidual"])


def test_bad_arguments(ops):
    x, _, dy, vectors = make(5, (3,), torch.float32, "contiguous")
    x, dy, (weight, bias, mean, var) = x[0], dy[0], vectors
    partials = ops.batch_norm_statistics(x)[None]
    before = [v.clone() for v in (mean, var)]
    for bad in ({"partials": partials[0]}, {"partials": partials.float()}, {"partials": partials[:0]}, {"eps": 0.0}):
        arguments = {"x": x, "residual": None, "partials": partials, "weight": weight, "bias": bias}
        arguments |= {"mean": mean, "var": var, "counter": None, "momentum": 0.1, "eps": EPS}
        with pytest.raises(RuntimeError, match=r"partials|eps"):
            ops.batch_norm_act_apply(*(arguments | bad).values(), True, False)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    _, stats, _ = ops.batch_norm_act_apply(x, None, partials, weight, bias, None, None, None, 0.1, EPS, True, False)
    with pytest.raises(RuntimeError, match="sums"):
        ops.batch_norm_act_backward_apply(dy, x, weight, bias, stats, None, partials, True, True, False)
    with pytest.raises(RuntimeError, match="4 dimensions"):
        ops.batch_norm_statistics(x[0])
