"""Tables of context_parallel.py, and the page that holds those of real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pages


def real_table(rows: list[dict[str, Any]]) -> str:
    """Ratios are of the slowest rank: of the ideal share by CPU seconds, which other load on the machine
    leaves alone, and by the clock.
    """
    lines = [
        "| ranks | pattern | schedule | layout | wall s | CPU s | of ideal, CPU | of ideal, wall "
        "| dense zigzag ring over it, CPU | wall | waits s | MB sent | between nodes | peak MB | error |",
        "|" + "---|" * 15,
    ]
    for row in rows:
        same = [r for r in rows if r["world"] == row["world"]]
        ideal = [r for r in same if r["schedule"] == "ideal" and r["pattern"] == row["pattern"]]
        dense = next(r for r in same if r["pattern"] == "dense" and r["layout"] == "zigzag")
        cells = [row["world"], row["pattern"], row["schedule"], row["layout"]]
        cells += [f"{row[t]:.3f}" for t in ("s", "cpu_s")]
        cells += [f"{ideal[0][t] / row[t]:.2f}" if ideal else "" for t in ("cpu_s", "s")]
        cells += [f"{dense[t] / row[t]:.1f} x" for t in ("cpu_s", "s")]
        cells += [f"{row['wait_s']:.3f}"]
        cells += [f"{row['bytes'] / 1e6:.2f}", f"{row['between_nodes'] / 1e6:.2f}"]
        cells += ["" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"]
        cells += ["" if row["error"] is None else f"{row['error']:.0e}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def simulated_table(rows: list[dict[str, Any]]) -> str:
    """The best schedule of every profile, pattern and number of ranks, and the next one."""
    lines = [
        "| profile | pattern | ranks | best | fwd + bwd ms | second | x | ring x | MB in / between nodes |",
        "|" + "---|" * 9,
    ]
    for key in dict.fromkeys((r["profile"], r["pattern"], r["world"]) for r in rows):
        same = sorted(
            (r for r in rows if (r["profile"], r["pattern"], r["world"]) == key),
            key=lambda r: r["forward_s"] + r["backward_s"],
        )
        total = [r["forward_s"] + r["backward_s"] for r in same]
        ring = next(t for t, r in zip(total, same, strict=True) if r["schedule"] == "ring")
        best, (second_s, second) = same[0], (total[1], same[1]["schedule"])
        cells = [
            *key,
            best["schedule"],
            f"{best['forward_s'] * 1e3:.2f} + {best['backward_s'] * 1e3:.2f}",
            second,
        ]
        cells += [f"{second_s / total[0]:.2f}", f"{ring / total[0]:.2f}"]
        cells += [f"{best['bytes_in_node'] / 1e6:.1f} / {best['bytes_between_nodes'] / 1e6:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_report(path: Path, page: Path, mark: str) -> None:
    """Put the table of `path`, which a run wrote with --json, into the page between the lines `<!-- mark -->`
    and `<!-- end of mark -->`.
    """
    found = json.loads(path.read_text())
    first = found["rows"][0]
    density = f"{100 * first['density']:.0f} % of the causal blocks where the pattern is sparse"
    shape = f"{first['q_heads']} query and {first['kv_heads']} KV heads of {first['head_dim']}"
    facts = f"Python {found['python']}, torch {found['torch']}, {found['cores']} cores"
    given = found["arguments"]
    # The file of the rows is nobody else's.
    given = [x for i, x in enumerate(given) if x != "--json" and (i == 0 or given[i - 1] != "--json")]
    text = (
        f"{first['tokens']:,} tokens, {shape}, blocks of {first['block']}, {density}, medians of "
        f"{first['repeats']}; {facts}.\n\n"
        f"    python tools/bench/context_parallel.py {' '.join(given)}\n\n"
    )
    pages.put(page, text + real_table(found["rows"]), mark)
