"""What a run writes: a line of JSON for every fact, at once, and a page that is rewritten with it.

Both are whole at any moment: a line is one write, and a page replaces the one before it in one step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""Its "kind" is facts, plan, begin, done, time, sweep, profile, dropped or end."""
LINES, PAGE = "lines.jsonl", "report.md"
FAILED = "FAILED"


def read(path: Path) -> list[Record]:
    """The records of a file; a line that was not finished is left out."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class Log:
    """Appends records, and keeps the page up to date.

    Args:
        folder: for the two files.
        resume: goes on with the file that is there, instead of a new one.
        echo: also prints what a person waits for.
    """

    def __init__(self, folder: Path, *, resume: bool = False, echo: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._page, self._echo = folder / PAGE, echo
        path = folder / LINES
        self.records = read(path) if resume and path.exists() else []
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if resume else os.O_TRUNC), 0o644)
        if resume:
            os.write(self._file, b"\n")  # after a line that was not finished

    def write(self, kind: str, **fields: Any) -> None:
        """One fact."""
        record = {"kind": kind, **fields}
        self.records.append(record)
        os.write(self._file, (json.dumps(record) + "\n").encode())
        draft = self._page.with_suffix(".tmp")
        draft.write_text(page(self.records))
        os.replace(draft, self._page)
        if self._echo and (text := shown(record)):
            print(text, flush=True)

    def of(self, kind: str) -> list[Record]:
        """The records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    def close(self) -> None:
        os.close(self._file)


def failed(records: Iterable[Record]) -> list[Record]:
    """What was done and went wrong."""
    return [r for r in records if r["kind"] == "done" and r["verdict"].startswith(FAILED)]


def unproven(records: Sequence[Record]) -> dict[str, str]:
    """Backends of which a check failed, or none passed, with which."""
    found = {}
    for backend in dict.fromkeys(r["backend"] for r in records if r["kind"] == "time" and r["backend"]):
        checks = [r for r in records if r["kind"] == "done" and r["backend"] == backend and r["proves"]]
        wrong = failed(checks)
        if wrong:
            found[backend] = f"{len(wrong)} of {len(checks)} checks failed, {wrong[0]['what']} first"
        elif not any(r["verdict"] == "ok" for r in checks):
            found[backend] = "no check was made"
    return found


def measured(records: Sequence[Record]) -> Record | None:
    """The device and the proven times of a run, for docs/benchmarks.md; None where there are none."""
    doubts = unproven(records)
    times = [r for r in records if r["kind"] == "time" and r["backend"] not in doubts and r["of_floor"] is not None]
    device = next((r["device"] for r in records if r["kind"] == "facts"), "a GPU")
    return {"device": device, "times": times} if any(r["backend"] for r in times) else None


def unfinished(records: Sequence[Record]) -> str:
    """What was begun and not finished, or ""."""
    open_: dict[tuple[str, str], str] = {}
    for r in records:
        if r["kind"] == "begin":
            open_[r["step"], r["what"]] = f"{r['step']}: {r['what']}"
        elif r["kind"] == "done":
            open_.pop((r["step"], r["what"]), None)
    return "; ".join(open_.values())


def shown(r: Record) -> str:
    """A line on the screen."""
    if r["kind"] == "done":
        return f"{r['seconds']:6.1f} s  {r['step']}: {r['what']:<60} {r['verdict']}"
    if r["kind"] == "time":
        share = "" if r["of_floor"] is None else f" {r['of_floor']:6.0%} of {r['floor']}"
        rate = f"{r['milliseconds']:9.3f} ms {r['gigabytes_per_second']:6.0f} GB/s"
        return f"{r['shape']:>16} {r['dtype']:<9} {r['name']:<34} {rate}{share}"
    if r["kind"] == "dropped":
        return f"dropped: {r['step']}: {r['what']} ({r['why']})"
    return ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines] if lines else []


def _state(records: Sequence[Record]) -> str:
    if any(r["kind"] == "end" for r in records):
        return "The run is complete."
    return f"**The run is not complete.** Last begun: {unfinished(records) or 'nothing'}."


def _times(records: Sequence[Record]) -> list[str]:
    doubts = unproven(records)
    rows = []
    for r in (r for r in records if r["kind"] == "time"):
        name = r["name"] + (" (unproven)" if r["backend"] in doubts else "")
        share = "" if r["of_floor"] is None else f"{r['of_floor']:.0%} of {r['floor']}"
        called = "" if r["called_ms"] is None else f"{r['called_ms']:.3f}"
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f}"
        rate = f"{r['gigabytes_per_second']:.0f}"
        rows.append([r["shape"], r["dtype"], name, f"{r['milliseconds']:.3f}", rate, share, called, peak])
    head = ["N x V", "dtype", "way", "ms", "GB/s", "share", "ms, called from Python", "peak MB"]
    return _table(head, rows)


def page(records: Sequence[Record]) -> str:
    """What a person reads, the bad news first."""
    done = [r for r in records if r["kind"] == "done"]
    wrong = failed(records)
    lines = [f"# gpu-verify: {len(done)} steps done, {len(wrong)} failed", "", _state(records), ""]
    for r in records:
        if r["kind"] == "facts":
            lines += [f"- {key}: {value}" for key, value in r.items() if key != "kind"]
    lines += [f"- **{backend}: its times are unproven: {why}**" for backend, why in unproven(records).items()]
    lines += [f"- dropped: {r['step']}: {r['what']} ({r['why']})" for r in records if r["kind"] == "dropped"]
    lines += _table(["failed", "verdict"], [[f"{r['step']}: {r['what']}", r["verdict"]] for r in wrong])
    if times := _times(records):
        lines += [
            "",
            "Forward and backward. GB/s: two reads and one write of (N, V), of DUSLoss one read and one write,",
        ]
        lines += ["over the time of a CUDA graph's replay; the share is that of torch.add or torch.neg, which move the"]
        lines += ["same bytes in the same run.", *times]
    chosen = [r for r in records if r["kind"] == "sweep"]
    rows = [[r["backend"], r["loss"], r["shape"], r["plan"], f"{r['milliseconds']:.3f}", r["verdict"]] for r in chosen]
    lines += _table(["sweep", "loss", "N x V", "plan", "ms", "verdict"], rows)
    profiles = [[r["what"], r["kernel"], ", ".join(f"{k}: {v}" for k, v in r["metrics"].items())] for r in records
                if r["kind"] == "profile"]  # fmt: skip
    lines += _table(["ncu", "kernel", "metrics"], profiles)
    lines += _table(
        ["step", "check", "verdict", "s"], [[r["step"], r["what"], r["verdict"], f"{r['seconds']:.1f}"] for r in done]
    )
    return "\n".join(lines) + "\n"
