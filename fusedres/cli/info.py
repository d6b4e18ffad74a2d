"""``fusedres info``: versions, libraries, SIMD level, devices, and what serves each op and why."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info", help="what is installed, and what serves each op and why", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    from .. import info

    facts = info()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def render(facts: dict[str, Any]) -> str:
    cpu = facts["cpu"]
    lines = [
        f"fusedres   {facts['version']}",
        f"torch      {facts['torch']}",
        f"python     {facts['python']}",
        f"triton     {facts['triton'] or 'not installed'}",
        f"platform   {facts['platform']}",
        f"cpu        {cpu['name']}, {cpu['capability']}, {cpu['threads']} threads",
        f"devices    {', '.join(facts['devices'])}",
        f"backend    {facts['backend']}",
        *(f"choices    {device}: {source}" for device, source in facts["choices"].items()),
        "",
        "libraries",
    ]
    width = max(map(len, facts["libraries"]))
    for name, library in facts["libraries"].items():
        state = "loaded" if library["loaded"] else "absent"
        detail = library["path"] if library["loaded"] else library["error"] or "not built"
        lines.append(f"  {name:<{width}}  {state}  {' '.join(str(detail).split())}")

    devices = list(next(iter(facts["ops"].values()), {}))
    width = max(map(len, facts["ops"]), default=0)
    for device in devices:
        servers = {name: by[device]["served_by"] for name, by in facts["ops"].items()}
        column = max(map(len, servers.values()))
        lines += ["", f"ops on {device}"]
        lines += [
            f"  {name:<{width}}  {server:<{column}}  {facts['ops'][name][device]['why']}".rstrip()
            for name, server in servers.items()
        ]
    return "\n".join(lines)
