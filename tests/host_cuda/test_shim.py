"""The shim itself: each facility computes what CUDA defines, and kernels with mistakes are found out."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent
_ENVIRON = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # what `make sanitize` preloads


@pytest.fixture(scope="module")
def facilities(compile_for_host, tmp_path_factory):
    """``facilities.name(tensors and numbers)``: raises RuntimeError with the launch's error."""
    target = tmp_path_factory.mktemp("facilities") / "facilities.so"
    sanitize = os.environ.get("FUSEDRES_SANITIZE") == "1"
    library = ctypes.CDLL(compile_for_host(_HERE / "facilities.cu", target, "-shared", sanitize=sanitize))

    class Facilities:
        def __getattr__(self, name):
            function = getattr(library, name)
            function.restype = ctypes.c_char_p

            def call(*args):
                pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
                error = function(*pointers)
                if error is not None:
                    raise RuntimeError(error.decode())

            return call

    return Facilities()


def test_indices(facilities, in_every_order):
    def where():
        out = torch.empty(12, 24, dtype=torch.int32)
        facilities.where(out)
        return out

    block, thread = torch.arange(12)[:, None], torch.arange(24)[None, :]
    blocks = block // 6 * 100000 + block // 2 % 3 * 10000 + block % 2 * 1000
    threads = thread // 8 * 100 + thread // 4 % 2 * 10 + thread % 4
    assert torch.equal(in_every_order(where), (blocks + threads).int())


@pytest.mark.parametrize(("dtype", "threads"), [(torch.float32, 64), (torch.float64, 256)])
def test_static_shared_memory(facilities, in_every_order, dtype, threads):
    x = torch.randint(-100, 100, (5, threads)).to(dtype)

    def total():
        out = torch.empty(5, dtype=dtype)
        getattr(facilities, "static_sum_float" if dtype == torch.float32 else "static_sum_double")(x, out, 5)
        return out

    assert torch.equal(in_every_order(total), x.sum(1))


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_dynamic_shared_memory_and_shuffles(facilities, in_every_order, threads):
    x = torch.randint(-100, 100, (3, threads)).float()

    def total():
        out = torch.empty(3)
        facilities.dynamic_sum(x, out, 3, threads)
        return out

    assert torch.equal(in_every_order(total), x.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
@pytest.mark.parametrize(("amount", "width"), [(1, 32), (5, 32), (16, 32), (3, 8), (1, 2), (9, 16)])
def test_shuffles(facilities, in_every_order, dtype, amount, width):
    x = torch.randint(-(2**31), 2**31 - 1, (64,)).to(dtype)
    name = {torch.float32: "float", torch.float64: "double", torch.int32: "int", torch.int64: "long"}[dtype]

    def shuffle():
        out = torch.empty(4, 64, dtype=dtype)
        getattr(facilities, f"shuffles_{name}")(x, out, amount, width)
        return out

    lane = torch.arange(64)
    first, last = lane // width * width, lane // width * width + width - 1
    sources = [
        first + amount % width,
        torch.where(lane - amount >= first, lane - amount, lane),
        torch.where(lane + amount <= last, lane + amount, lane),
        torch.where(lane ^ amount <= last, lane ^ amount, lane),
    ]
    assert torch.equal(in_every_order(shuffle), torch.stack([x[s] for s in sources]))


@pytest.mark.parametrize("threads", [32, 64, 48])
def test_parts_of_a_warp(facilities, in_every_order, threads):
    def halves():
        out = torch.empty(threads, dtype=torch.int32)
        facilities.halves(out, threads)
        return out

    thread = torch.arange(threads)
    part = torch.where(thread % 32 < 16, 4, 16)  # how many lanes have added their numbers
    total = part * (thread // part * part) + part * (part - 1) // 2
    assert torch.equal(in_every_order(halves), (2 * total).int())


@pytest.mark.parametrize("threads", [32, 100])
@pytest.mark.parametrize("votes", ["none", "all", "some"])
def test_votes(facilities, in_every_order, threads, votes):
    x = {"none": torch.zeros(threads), "all": torch.ones(threads), "some": torch.randint(0, 2, (threads,))}[votes].int()

    def vote():
        out = torch.empty(6, threads, dtype=torch.int32)
        facilities.votes(x, out, threads)
        return out

    got = in_every_order(vote)
    for begin in range(0, threads, 32):
        warp = slice(begin, min(begin + 32, threads))
        bits = sum(int(v) << i for i, v in enumerate(x[warp]))
        assert set((got[0, warp].long() & 0xFFFFFFFF).tolist()) == {bits}
        assert set(got[1, warp].tolist()) == {int(x[warp].any())}
        assert set(got[2, warp].tolist()) == {int(x[warp].all())}
    for row, wanted in ((3, x.sum()), (4, x.any()), (5, x.all())):
        assert set(got[row].tolist()) == {int(wanted)}


def test_last_block(facilities, in_every_order):
    x = torch.randn(37)

    def total():
        partial, tickets, out = torch.empty(37), torch.empty(1, dtype=torch.int32), torch.empty(1)
        facilities.last_block(x, partial, tickets, out, 37)
        return out

    torch.testing.assert_close(in_every_order(total), 2 * x.sum()[None])


def test_shared_memory_starts_as_nan_in_every_block(facilities):
    out = torch.zeros(6)
    facilities.unwritten(out, 3)
    assert out.isnan().all()


def test_arithmetic(facilities):
    x, out = torch.tensor([1 + 2**-12, 1 - 2**-12, -1.0]), torch.empty(7)
    facilities.arithmetic(x, out)
    a, b, c = x.double()
    wanted = torch.stack(
        [a * b + c, a * b + c, a.rsqrt(), torch.tensor(3 + 7 + 4 + 4 + 31), -a, torch.tensor(3), a + b - 1]
    )
    assert torch.equal(out, wanted.float())


def test_launches_that_a_device_refuses(facilities):
    out = torch.empty(2000, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        facilities.too_many_threads(out)
    with pytest.raises(RuntimeError, match="more dynamic shared memory"):
        facilities.too_much_memory(out, 100 * 1024, False)
    facilities.last_error(out)
    assert out[0] == 1  # cudaErrorInvalidValue
    facilities.last_error(out)
    assert out[0] == 0
    facilities.too_much_memory(out, 100 * 1024, True)


def test_device_is_what_the_environment_says(facilities, monkeypatch):
    values = torch.empty(4, dtype=torch.int32)
    facilities.device(values)
    assert values.tolist() == [132, 50 << 20, 227 * 1024, 32]
    monkeypatch.setenv("HOST_CUDA_SMS", "4")
    monkeypatch.setenv("HOST_CUDA_L2_BYTES", "4096")
    monkeypatch.setenv("HOST_CUDA_BLOCKS_PER_SM", "2")
    facilities.device(values)
    assert values.tolist() == [4, 4096, 227 * 1024, 2]


@pytest.mark.parametrize("source", ["facilities.cu", "broken.cu"])
def test_the_test_kernels_are_cuda(source, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++20", "-arch=sm_90", f"-I{_HERE.parents[1] / 'csrc'}", "-c", _HERE / source]
    subprocess.run([*command, "-o", tmp_path / "kernels.o"], check=True, env=_ENVIRON)


@pytest.fixture(scope="module")
def broken(compile_for_host, tmp_path_factory):
    """``broken(case, order, sanitize)`` -> what the run of one broken kernel prints, and whether it succeeded."""
    programs = {}

    def run(case: str, order: str = "forward", sanitize: bool = False) -> tuple[str, bool]:
        if sanitize not in programs:
            target = tmp_path_factory.mktemp("broken") / "broken"
            programs[sanitize] = compile_for_host(_HERE / "broken.cu", target, sanitize=sanitize)
        done = subprocess.run(
            [programs[sanitize], case],
            env={**_ENVIRON, "HOST_CUDA_ORDER": order, "ASAN_OPTIONS": "symbolize=0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout, done.returncode == 0

    return run


@pytest.mark.parametrize("sanitize", [False, True])
def test_a_correct_kernel_is_not_accused(broken, sanitize):
    wanted = [f"{(i + 33) % 64 + 1}" for i in range(64)]
    for order in ("forward", "reverse", "1", "2", "3"):
        text, succeeded = broken("correct", order, sanitize)
        assert succeeded, text
        assert text.split() == wanted


@pytest.mark.parametrize(
    "case", ["missing barrier", "missing second barrier", "missing warp barrier", "order of blocks"]
)
def test_missing_barrier_shows(broken, case):
    """A result that depends on who comes first: NaN, or different numbers in different orders."""
    outputs = {order: broken(case, order) for order in ("forward", "reverse", "1", "2")}
    assert all(succeeded for _, succeeded in outputs.values())
    assert len({text for text, _ in outputs.values()}) > 1


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "write beyond global": "heap-buffer-overflow",
        "read beyond global": "heap-buffer-overflow",
        "write beyond shared": "global-buffer-overflow",
        "write beyond dynamic": "use-after-poison",
        "misaligned": "misaligned address",
    }.items(),
)
def test_sanitizer_finds_wrong_accesses(broken, case, words):
    text, succeeded = broken(case, sanitize=True)
    assert not succeeded
    assert words in text


def test_write_beyond_dynamic_memory_is_found_without_sanitizer(broken):
    assert broken("write beyond dynamic") == ("write beyond dynamic shared memory\n", False)


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "barrier after end": r"__syncthreads in line \d+: 16 threads of the block have ended",
        "two barriers": r"__syncthreads in line \d+: other threads of the block are at __syncthreads in line \d+",
        "barrier in half a warp": r"__shfl_xor_sync in line \d+: lanes that its mask names do not take part",
        "shuffle in half a warp": r"__shfl_xor_sync in line \d+: lanes that its mask names do not take part",
        "shuffle without itself": r"its mask lacks the lane that calls it",
        "shuffle from outside": r"it reads a lane that does not take part",
    }.items(),
)
@pytest.mark.parametrize("order", ["forward", "reverse", "1"])
def test_divergence_is_reported(broken, case, words, order):
    text, succeeded = broken(case, order)
    assert not succeeded
    assert re.search(words, text), text
