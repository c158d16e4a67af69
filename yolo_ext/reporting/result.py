# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a command returns: a dict of what it found, with the files and figures that a script or a notebook looks for."""

import json
from pathlib import Path
from typing import Any

from yolo_ext.reporting.tables import COMPARED, TEXT, Row, comparison_rows, comparison_table, note

FILES = ("best", "onnx", "int8", "report", "run_dir")
SHOWN = ("headline", "before", "after", "checks", "run_dir")  # by themselves


class Result(dict[str, Any]):
    """What a command found, as in its `summary.json`, `bench.json` or the like; files are None where there are none."""

    @property
    def run_dir(self) -> Path | None:
        """Folder of the run."""
        return Path(self["run_dir"]) if self.get("run_dir") else None

    @property
    def best(self) -> Path | None:
        """Float weights: ``weights/best.pt``, or ``last.pt`` of a training without validation."""
        return self._file("weights/best.pt") or self._file("weights/last.pt")

    @property
    def onnx(self) -> Path | None:
        """ONNX file in FP32 (or FP16, by `export`)."""
        return self._file("onnx/fp32.onnx", ".onnx")

    @property
    def int8(self) -> Path | None:
        """ONNX file in INT8."""
        return self._file("onnx/int8.onnx", "_int8.onnx")

    @property
    def report(self) -> Path | None:
        """Page to open in a browser: the report of a run, or the review sheet of `label`."""
        return self._file("report.html") or self._file("review.html")

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures of the result: `params`, `gflops`, `map`, `latency_ms` and others of `summary.json`."""
        return dict(self.get("after") or {})

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Name, value, limit and `passed` of each check and budget."""
        return list(self.get("checks") or [])

    @property
    def passed(self) -> bool:
        """Whether all checks and budgets are met."""
        return bool(self.get("passed", all(c["passed"] for c in self.checks)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON holds; paths become strings."""
        return json.loads(json.dumps(self, default=str))

    def _file(self, place: str, end: str = "\n") -> Path | None:
        """Return a file of the run folder, or the first of `files` that ends like this, if it exists."""
        files = [Path(f) for f in self.get("files", ()) if str(f).endswith(end)]
        files += [self.run_dir / place] if self.run_dir else []
        return next((f for f in files if f.is_file()), None)

    def _told(self) -> tuple[str, list[Row], list[str]]:
        """Return the headline, the compared figures where some changed, and lines on the rest."""
        before, after, proved = (self.get(k) for k in COMPARED)
        rows = comparison_rows(before, after, proved) if before != after else []
        told = {"note": note(after, proved)} if rows else {k: v for k, v in self.items() if k not in SHOWN}
        told |= {name: getattr(self, name) for name in FILES}
        told["failed"] = ", ".join(c["name"] for c in self.checks if not c["passed"])
        counted = {k: f"{len(v)} in all" if isinstance(v, (list, dict)) else v for k, v in told.items()}
        return self.get("headline") or "Result", rows, [f"{k}: {v}" for k, v in counted.items() if v not in (None, "")]

    def __repr__(self) -> str:
        """Show the headline, Before | After | Delta, and where the files lie."""
        headline, rows, told = self._told()
        table = [comparison_table(*(self.get(k) for k in COMPARED))] if rows else []
        return "\n".join([headline, *table, *told])

    def _repr_html_(self) -> str:
        """Show the same in a notebook."""
        headline, rows, told = self._told()
        return TEXT.get_template("result.html.j2").render(headline=headline, rows=rows, told=told)
