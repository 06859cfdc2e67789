"""Results in the pages of docs/benchmarks."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, text: str, mark: str) -> None:
    """Replace what stands between the lines `<!-- mark -->` and `<!-- end of mark -->` of the page."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    whole = page.read_text()
    before, after = whole.split(begin)[0], whole.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
