"""Parts of a run: commands with a time limit each, whose failure is recorded and stops nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TAIL = 4000  # characters of output that are kept of a command that failed
PATIENCE = 45  # seconds that a quiet part waits for work in the background


@dataclass(frozen=True)
class Command:
    """A process; `background`: it may outlast its part, until a quiet one begins."""

    name: str
    argv: tuple[str, ...]
    background: bool = False


@dataclass(frozen=True)
class Part:
    """Commands that run side by side.

    Attributes:
        seconds: limit; what still runs then is ended.
        needs: runs only if one of these parts succeeded (an empty tuple: always).
        unless: runs only if this part did not succeed.
        quiet: measures, so that nothing may run in the background.
    """

    name: str
    commands: tuple[Command, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    unless: str | None = None
    quiet: bool = False


@dataclass
class Outcome:
    """How a part ended: ok, failed, timeout or skipped; `exits` by command, `output` the end of what failed printed."""

    name: str
    status: str
    seconds: float = 0.0
    why: str = ""
    exits: dict[str, int | None] = field(default_factory=dict)
    output: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v not in ("", {})}


class _Process:
    """A command in a session of its own, so that its children end with it."""

    def __init__(self, command: Command, log: Path, environ: Mapping[str, str], cwd: Path) -> None:
        self.command, self.log = command, log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                cwd=cwd,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self.popen.poll() is None

    def end(self) -> None:
        """Ask, then insist; the whole session, for a shell's or a test's children would go on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout=5)
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


class Runner:
    """Runs parts one after the other within `budget` seconds in all."""

    def __init__(
        self,
        budget: float,
        directory: Path,
        environ: Mapping[str, str],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.budget, self.directory, self.environ, self.say = budget, directory, environ, say
        self._clock, self._after = clock, after
        self._start = clock()
        self._background: list[_Process] = []
        self.outcomes: dict[str, Outcome] = {}

    def left(self) -> float:
        return self.budget - (self._clock() - self._start)

    def run(self, parts: Iterable[Part]) -> list[Outcome]:
        """All parts, and after each `after()`, which saves what there is so far."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            for part in parts:
                outcome = self.outcomes[part.name] = self._run(part)
                self.say(_line(outcome))
                self._after()
        finally:
            self._end_background(0)
        return list(self.outcomes.values())

    def log(self, part: str, command: str) -> Path:
        return self.directory / f"{part}-{command}.log"

    def _succeeded(self, name: str) -> bool:
        return name in self.outcomes and self.outcomes[name].status == "ok"

    def _run(self, part: Part) -> Outcome:
        if part.unless is not None and self._succeeded(part.unless):
            return Outcome(part.name, "skipped", why=f"{part.unless} succeeded")
        if part.needs and not any(map(self._succeeded, part.needs)):
            return Outcome(part.name, "skipped", why=f"{' and '.join(part.needs)} did not succeed")
        if part.quiet:
            self._end_background(min(PATIENCE, self.left()))
        limit = min(part.seconds, self.left())
        if limit < 1:
            return Outcome(part.name, "skipped", why="no time left")
        self.say(f"-- {part.name}, at most {limit:.0f} s")
        start = self._clock()
        processes, failed = [], {}
        for command in part.commands:
            try:
                process = _Process(command, self.log(part.name, command.name), self.environ, self.directory)
            except OSError as error:
                failed[command.name] = str(error)
                continue
            (self._background if command.background else processes).append(process)
        late: list[_Process] = []
        try:
            while any(p.running() for p in processes) and self._clock() - start < limit:
                time.sleep(0.05)
        finally:  # also where the user interrupts
            late += [p for p in processes if p.running()]
            for process in late:
                process.end()
        exits = {p.command.name: None if p in late else p.popen.returncode for p in processes}
        bad = [p for p in processes if exits[p.command.name] != 0]
        output = "\n".join([f"{n}: {w}" for n, w in failed.items()] + [_tail(p.log) for p in bad])[-TAIL:]
        status = "timeout" if late else "failed" if bad or failed else "ok"
        return Outcome(part.name, status, round(self._clock() - start, 1), "", exits, output)

    def _end_background(self, patience: float) -> None:
        deadline = self._clock() + patience
        while any(p.running() for p in self._background) and self._clock() < deadline:
            time.sleep(0.05)
        for process in self._background:
            if process.running():
                self.say(f"   {process.command.name} in the background is ended")
                process.end()
        self._background.clear()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-TAIL:]


def _line(outcome: Outcome) -> str:
    text = f"   {outcome.name}: {outcome.status}"
    if outcome.status == "skipped":
        return f"{text}, {outcome.why}"
    text += f" in {outcome.seconds:.0f} s"
    return f"{text}\n{outcome.output.rstrip()}" if outcome.output else text


def chosen(parts: Sequence[Part], only: Sequence[str], skip: Sequence[str]) -> list[Part]:
    """The parts to run; what `only` names is run even if what it needs is not among them."""
    kept = [p for p in parts if (not only or p.name in only) and p.name not in skip]
    names = {p.name for p in kept}
    return [
        p if not p.needs or names & set(p.needs) else Part(p.name, p.commands, p.seconds, (), p.unless, p.quiet)
        for p in kept
    ]
