"""Markdown from the rows of a run: how its parts ended, the project's bars, every op, every model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..harness import geometric_mean

FUSED = ("cuda", "triton")
LARGE_BYTES = 64 << 20
PASS_BAR, HOST_BAR_US = 0.88, 12.0
EAGER_BAR, COMPILE_BAR, CUDNN_BAR = 1.8, 1.15, 1.0
MODEL_BAR = 1.25
FOLDED_BAR, FOLDED_PASS_BAR = 5500, 0.80
FOLDED_BARS = {"fusedres": 1.2, "compile-max": 1.35, "eager": 1.6}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """A line of the table of targets; `met` is None where nothing was measured."""

    what: str
    wanted: str
    measured: str
    met: bool | None


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def case_name(row: Row) -> str:
    residual = "+residual" if row.get("residual") and row["op"] == "batch_norm_act" else ""
    return f"{row['op']}{residual} {'x'.join(map(str, row['shape']))}"


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(case, dtype, layout) -> peer -> row, of what was timed."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if "ms" in row:
            cases[case_name(row), row["dtype"], row["layout"]][row["peer"]] = row
    return dict(cases)


def _of_bars(rows: Iterable[Row], dtype: str = "bfloat16") -> dict[tuple[str, str, str], dict[str, Row]]:
    """BN+ReLU and BN+add+ReLU at batch 256, channels_last."""
    chosen = [
        r
        for r in rows
        if r["op"] == "batch_norm_act"
        and r["shape"][0] == 256
        and (r.get("dtype"), r.get("layout")) == (dtype, "channels_last")
    ]
    return by_case(chosen)


def _against(what: str, cases: Mapping[Any, Mapping[str, Row]], ours: str, peer: str, wanted: float) -> Bar:
    ratios = [by[peer]["ms"] / by[ours]["ms"] for by in cases.values() if peer in by and ours in by]
    if not ratios:
        return Bar(what, f">= {wanted:.2f}x", "not measured", None)
    mean = geometric_mean(ratios)
    text = f"{mean:.2f}x ({min(ratios):.2f} .. {max(ratios):.2f}, {len(ratios)} shapes)"
    return Bar(what, f">= {wanted:.2f}x", text, mean >= wanted)


def _worst(what: str, cases: Mapping[tuple[str, str, str], Mapping[str, Row]], ours: str) -> Bar:
    """The slowest shape against the best of the others."""
    ratios = {}
    for (name, _, _), by in cases.items():
        others = [row["ms"] for peer, row in by.items() if peer not in FUSED]
        if ours in by and others:
            ratios[name] = min(others) / by[ours]["ms"]
    if not ratios:
        return Bar(what, ">= 1.00x", "not measured", None)
    name = min(ratios, key=ratios.__getitem__)
    return Bar(what, ">= 1.00x", f"{ratios[name]:.2f}x, {name}", ratios[name] >= 1.0)


def _passes(what: str, rows: Iterable[Row], ours: str) -> Bar:
    """The slowest pass over tensors of 64 MiB and more, as a share of the copy bandwidth of the run."""
    shares = {}
    for row in rows:
        if row.get("peer") != ours or row.get("layout") != "channels_last":
            continue
        n, c, h, w = row["shape"]
        if n * c * h * w * (4 if row["dtype"] == "float32" else 2) < LARGE_BYTES:
            continue
        for kernel in row.get("kernels", ()):
            if "share_of_copy" in kernel and kernel["launch"] != "finalise":
                shares[f"{case_name(row)} {kernel['launch']}"] = kernel["share_of_copy"]
    wanted = f">= {PASS_BAR:.0%}"
    if not shares:
        return Bar(what, wanted, "not measured", None)
    worst = min(shares, key=shares.__getitem__)
    return Bar(what, wanted, f"{shares[worst]:.0%}, {worst} ({len(shares)} passes)", shares[worst] >= PASS_BAR)


def _images(models: Iterable[Row], kind: str, batch: int, graph: bool) -> float | None:
    found = [
        m["images_per_s"]
        for m in models
        if "images_per_s" in m and (m["kind"], m["batch"], m["graph"]) == (kind, batch, graph)
    ]
    return found[0] if found else None


def _models(what: str, models: Sequence[Row], ours: str, peer: str, batch: int, graph: bool, wanted: float) -> Bar:
    mine, theirs = (_images(models, kind, batch, graph) for kind in (ours, peer))
    if mine is None or theirs is None:
        return Bar(what, f">= {wanted:.2f}x", "not measured", None)
    text = f"{mine / theirs:.2f}x ({mine:.0f} and {theirs:.0f} images/s)"
    return Bar(what, f">= {wanted:.2f}x", text, mine / theirs >= wanted)


def _host(what: str, host: Iterable[Row], ours: str) -> Bar:
    calls = {f"{case_name(r)} {r['dtype']}": r["forward_us"] for r in host if r["peer"] == ours and "forward_us" in r}
    if not calls:
        return Bar(what, f"<= {HOST_BAR_US:.0f} us", "not measured", None)
    slowest = max(calls, key=calls.__getitem__)
    return Bar(what, f"<= {HOST_BAR_US:.0f} us", f"{calls[slowest]:.1f} us, {slowest}", calls[slowest] <= HOST_BAR_US)


def _folded(models: Sequence[Row], kernels: Sequence[Row]) -> list[Bar]:
    """Of a step whose blocks are folded."""
    what = "folded: ResNet-50, batch 256, bf16 autocast, CUDA graph"
    images, wanted = _images(models, "folded", 256, True), f">= {FOLDED_BAR} images/s"
    lines = [
        Bar(what, wanted, "not measured", None)
        if images is None
        else Bar(what, wanted, f"{images:.0f} images/s", images >= FOLDED_BAR)
    ]
    for peer, least in FOLDED_BARS.items():
        lines.append(_models(f"{what}, against {peer}", models, "folded", peer, 256, True, least))
    what, wanted = "folded: slowest pass of a folded convolution, of its floor", f">= {FOLDED_PASS_BAR:.0%}"
    passes = [p for row in kernels if row["kind"] == "folded" for p in row.get("passes", ()) if p["share_of_floor"]]
    if not passes:
        return [*lines, Bar(what, wanted, "not measured", None)]
    worst = min(passes, key=lambda p: p["share_of_floor"])
    text = f"{worst['share_of_floor']:.0%}, {worst['group'].removeprefix('folded: ')} {worst['shape']}"
    return [*lines, Bar(what, wanted, f"{text} ({len(passes)} sizes)", worst["share_of_floor"] >= FOLDED_PASS_BAR)]


def bars(ops: Sequence[Row], models: Sequence[Row], host: Sequence[Row], kernels: Sequence[Row] = ()) -> list[Bar]:
    """The targets for a GPU, for each of our backends, and with folded convolutions."""
    lines = []
    half = _of_bars(ops, "float16")
    for ours in FUSED:
        cases = _of_bars(ops)
        name = f"{ours}: BN+ReLU, BN+add+ReLU, batch 256 bf16 NHWC, forward+backward"
        lines += [
            _passes(f"{ours}: slowest pass over >= 64 MiB, of copy bandwidth", ops, ours),
            _against(f"{name}, against eager", cases, ours, "eager", EAGER_BAR),
            _against(f"{name}, against torch.compile max-autotune", cases, ours, "compile-max", COMPILE_BAR),
            _against(f"{name}, against cuDNN", cases, ours, "cudnn", CUDNN_BAR),
            _against(f"{ours}: the same in fp16, against cuDNN", half, ours, "cudnn", CUDNN_BAR),
            _worst(f"{ours}: slowest shape against the best peer", cases, ours),
        ]
        for peer, wanted in (("eager", MODEL_BAR), ("compile-max", 1.0)):
            what = f"{ours}: ResNet-50, batch 256, bf16 autocast, CUDA graph, against {peer}"
            lines.append(_models(what, models, ours, peer, 256, True, wanted))
        for batch in (1, 8):
            what = f"{ours}: ResNet-50, batch {batch}, no graph, against eager"
            lines.append(_models(what, models, ours, "eager", batch, False, 1.0))
        lines.append(_host(f"{ours}: host time of a call with grad, slowest op", host, ours))
    return lines + _folded(models, kernels)


def ops_table(rows: Sequence[Row]) -> str:
    """A line per case: milliseconds of each peer, and the share of copy bandwidth of ours."""
    cases = by_case(rows)
    peers = [p for p in ("eager", "compile", "compile-max", "cudnn", *FUSED) if any(p in by for by in cases.values())]
    lines = []
    for (name, dtype, layout), by in cases.items():
        cells = []
        for peer in peers:
            row = by.get(peer)
            if row is None:
                cells.append("")
                continue
            share = f" ({row['share_of_copy']:.0%})" if peer in FUSED else ""
            mark = "" if row["timed"] == "graph" else "*"
            cells.append(f"{row['ms']:.3f}{mark}{share}")
        lines.append((name, dtype, layout, *cells))
    failed = [f"- {case_name(r)} {r.get('dtype', '')}, {r.get('peer', '')}: {r['error']}" for r in rows if "error" in r]
    text = (
        markdown(("Case, forward+backward, ms", "dtype", "Layout", *peers), lines) if lines else "No op was measured."
    )
    return "\n\n".join([text, *(["\n".join(failed)] if failed else [])])


def models_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        graph = {True: "graph", False: ""}.get(row.get("graph"), "")
        if "error" in row:
            lines.append((row["model"], row["kind"], str(row["batch"]), graph, row["error"], "", ""))
            continue
        eager = _images(rows, "eager", row["batch"], row["graph"])
        ratio = f"{row['images_per_s'] / eager:.2f}x" if eager else ""
        memory = f"{row['peak_mb']:.0f}" if row.get("peak_mb") else ""
        folded = f", {row['folded_blocks']} blocks folded" if row.get("folded_blocks") else ""
        kind = f"{row['kind']}{folded}"
        lines.append((row["model"], kind, str(row["batch"]), graph, f"{row['images_per_s']:.0f}", ratio, memory))
    header = ("Model", "", "Batch", "", "images/s", "against eager", "peak MB")
    return markdown(header, lines) if lines else "No model was measured."


def kernels_table(rows: Sequence[Row]) -> str:
    """Where the time of a step goes, a column of milliseconds for each kind; below it the passes of what is folded."""
    measured = [row for row in rows if "groups" in row]
    failed = [f"- {row['kind']}: {row['error']}" for row in rows if "error" in row]
    if not measured:
        return "\n".join(["No kernels were measured.", *failed])
    of = [{group["group"]: group for group in row["groups"]} for row in measured]

    def cell(group: Row | None) -> str:
        return "" if group is None else f"{group['ms']:.3f} ({group['kernels']})"

    names = dict.fromkeys(name for groups in of for name in groups)
    lines = [(name, *(cell(groups.get(name)) for groups in of)) for name in names]
    lines += [
        ("all kernels", *(f"{row['kernels_ms']:.3f} ({row['kernels']})" for row in measured)),
        ("between kernels", *(f"{row['between_ms']:.3f}" for row in measured)),
        ("**step**", *(f"**{row['ms']:.3f}**" for row in measured)),
    ]
    header = (f"{measured[0]['model']}, batch {measured[0]['batch']}: ms (kernels)", *(row["kind"] for row in measured))
    tables = [markdown(header, lines)]
    for row in measured:
        passes = [
            (
                p["group"].removeprefix("folded: "),
                p["shape"],
                str(p["calls"]),
                f"{p['us']:.1f}",
                f"{p['floor_us']:.1f}",
                p["bound"],
                f"{p['share_of_floor']:.0%}" if p["share_of_floor"] else "",
            )
            for p in row["passes"]
        ]
        if passes:
            peaks = f"copy {row['copy_gb_per_s']:.0f} GB/s, matrix product {row['matmul_tflop_per_s']:.0f} Tflop/s"
            header = (f"{row['kind']}: {peaks}", "pixels x inputs -> outputs", "Calls", "us", "floor", "of", "share")
            tables.append(markdown(header, passes))
    return "\n\n".join([*tables, *(["\n".join(failed)] if failed else [])])


def report(
    env: Row,
    parts: Sequence[Row],
    ops: Sequence[Row],
    models: Sequence[Row],
    host: Sequence[Row],
    kernels: Sequence[Row] = (),
) -> str:
    """The whole page."""
    where = (
        f"{env.get('device', 'no device')}, driver {env.get('driver')}, torch {env.get('torch')},"
        f" triton {env.get('triton')}, nvcc {env.get('nvcc')}, fusedres {env.get('fusedres')},"
        f" commit {env.get('commit')}"
    )
    copies = [r["copy_gb_per_s"] for r in ops if "copy_gb_per_s" in r]
    if copies:
        where += f"; copy {min(copies):.0f} .. {max(copies):.0f} GB/s"
    ended = [(p["name"], p["status"], f"{p.get('seconds', 0):.0f}", p.get("why", "")) for p in parts]
    verdict = {True: "yes", False: "**no**", None: ""}
    lines = [(b.what, b.wanted, b.measured, verdict[b.met]) for b in bars(ops, models, host, kernels)]
    return "\n\n".join(
        [
            where,
            markdown(("Part", "Ended", "s", ""), ended),
            markdown(("Target", "Wanted", "Measured", "Met"), lines),
            ops_table(ops),
            models_table(models),
            kernels_table(kernels),
        ]
    )
