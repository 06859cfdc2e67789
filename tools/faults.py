"""Injects faults into real two-process training jobs and tables what each cost.

    python tools/faults.py --out DIR [--workers N] [--only NAME ...]     run what has no result in DIR yet
    python tools/faults.py --out DIR --table                             print the table of the results

Every job is launched as launch/local.sh does it, with the faults in the worker processes only. A scenario
passes when the exit codes, the steps done again, the messages and the end of the run are as they must be:
losses, parameters, moments and random states equal those of a run without faults bit for bit, every
checkpoint on disk is whole, and no process is left.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fault_suite import flows
from fault_suite.job import STEPS, Job, losses, state_hash
from fault_suite.scenarios import SCENARIOS, Scenario

from ltrain.train.checkpoint import folder as checkpoint


def reference(out: Path, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Losses and state of a run without faults, and a job that was stopped after step 6, made once."""
    key = "reference-cp" if any("context" in text for text in overrides) else "reference"
    path = out / key / "result.json"
    if not path.exists():
        layout = overrides if key.endswith("cp") else ()
        job = Job(out / key, layout)
        _expect(job.launch().code, 0, job)
        found = {"losses": losses(job.run), "state": state_hash(job.run)}
        if not layout:
            half = Job(out / "half")
            stop = {"point": "step", "rank": 1, "step": 6, "action": "signal", "signal": "SIGUSR1"}
            _expect(half.launch([stop]).code, 75, half)
        path.write_text(json.dumps(found))
    loaded: dict[str, Any] = json.loads(path.read_text())
    loaded["losses"] = {int(step): tuple(values) for step, values in loaded["losses"].items()}
    return loaded


def _expect(code: int, expected: int, job: Job) -> None:
    if code != expected:
        raise SystemExit(f"{job.folder}: exit code {code}, not {expected}:\n{job.outcomes[-1].text[-3000:]}")


def run(scenario: Scenario, out: Path) -> dict[str, Any]:
    """Run one scenario and judge it; the result is kept in its folder."""
    target = reference(out, scenario.overrides)
    job = Job(out / scenario.name, scenario.overrides)
    if scenario.half and scenario.flow is None:
        shutil.copytree(out / "half" / "outputs", job.folder / "outputs")
    if scenario.prepare is not None and scenario.flow is None:
        scenario.prepare(job)
    (scenario.flow or flows.launches)(job, scenario)
    problems = judge(scenario, job, target)
    first = 6 if scenario.half and scenario.flow is None else 0
    found = {
        "name": scenario.name,
        "kind": scenario.kind,
        "must": scenario.must,
        "codes": [outcome.code for outcome in job.outcomes],
        "restarts": job.starts() - len(job.outcomes),
        "repeated": repeated(job, first),
        "recovery_s": job.recovery_s(),
        "seconds": round(sum(outcome.seconds for outcome in job.outcomes), 1),
        "equal": scenario.equal and not problems,
        "problems": problems,
    }
    (job.folder / "result.json").write_text(json.dumps(found, indent=1))
    return found


def repeated(job: Job, first: int) -> int:
    """Optimizer steps that were done more than once, of a job that began after step `first`."""
    done = job.executed()
    return sum(step <= max(first, *done[:i], first) for i, step in enumerate(done))


def judge(scenario: Scenario, job: Job, target: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    codes = tuple(outcome.code for outcome in job.outcomes)
    text = "".join(outcome.text for outcome in job.outcomes)
    problems = [] if codes == scenario.codes else [f"exit codes {codes}, not {scenario.codes}"]
    problems += [f"the output lacks {part!r}" for part in scenario.says if part not in text]
    if "Traceback" in text and "injected" not in text:
        problems.append("a traceback was shown")
    first = 6 if scenario.half and scenario.flow is None else 0
    again = repeated(job, first)
    if again > scenario.most_repeated:
        problems.append(f"{again} steps were done again, more than {scenario.most_repeated}")
    for path in job.checkpoints.glob("step-*"):
        try:
            checkpoint.verify(path)
        except checkpoint.CheckpointError as error:
            problems.append(f"on disk: {error}")
    if codes and codes[-1] == 0:
        problems += [f"left behind: {path.name}" for path in job.checkpoints.glob(".t*")]
    if scenario.equal and not problems:
        logged = losses(job.run)
        different = [step for step in range(1, STEPS + 1) if logged.get(step) != target["losses"][step]]
        if different:
            problems.append(f"losses differ at steps {different}")
        if state_hash(job.run) != target["state"]:
            problems.append("the final state differs")
    if job.orphans():
        problems.append(f"processes are left: {job.orphans()}")
    return [*problems, *scenario.check(job)]


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| fault | must cost | exit codes | restarts | steps again | back at work after | end of the run |",
        "|---|---|---|---|---|---|---|",
    ]
    expected = {scenario.name: scenario for scenario in SCENARIOS}
    for r in results:
        after = f"{r['recovery_s']:.1f} s" if r["recovery_s"] is not None and r["restarts"] else "-"
        end = "bitwise equal" if expected[r["name"]].equal else "as it must be"
        end = f"**FAILED**: {'; '.join(r['problems'])}" if r["problems"] else end
        codes = ", ".join(map(str, r["codes"]))
        row = (r["kind"], r["must"], codes, max(r["restarts"], 0), r["repeated"], after, end)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    failed = sum(bool(r["problems"]) for r in results)
    lines.append(f"\n{len(results)} faults, {failed} not as they must be.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the jobs and results")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="jobs at a time"
    )
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="these scenarios only")
    parser.add_argument("--table", action="store_true", help="print the table of the results and end")
    args = parser.parse_args()
    out = args.out.resolve()
    chosen = [s for s in SCENARIOS if args.only is None or s.name in args.only]
    if args.only is not None and len(chosen) < len(args.only):
        parser.error(f"known: {', '.join(s.name for s in SCENARIOS)}")
    if not args.table:
        waiting = [s for s in chosen if not (out / s.name / "result.json").exists()]
        for scenario in [s for s in waiting if s.needs_root and not _can_mount()]:
            print(f"left out: {scenario.name} needs to mount a file system", flush=True)
            waiting.remove(scenario)
        for overrides in {s.overrides if "context" in str(s.overrides) else () for s in waiting}:
            reference(out, overrides)

        def one(scenario: Scenario) -> None:
            try:
                found = run(scenario, out)
            except Exception as error:  # the suite goes on; the scenario has no result and is run again
                print(f"{scenario.name}: {type(error).__name__}: {error}", flush=True)
                return
            verdict = "; ".join(found["problems"]) or "as it must be"
            print(f"{scenario.name}: {found['codes']} in {found['seconds']} s: {verdict}", flush=True)

        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(one, waiting))
    files = [out / s.name / "result.json" for s in chosen]
    results = [json.loads(path.read_text()) for path in files if path.exists()]
    print(f"\nPython {platform.python_version()}, {os.cpu_count()} cores\n\n{table(results)}")
    return 1 if len(results) < len(chosen) or any(r["problems"] for r in results) else 0


def _can_mount() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


if __name__ == "__main__":
    sys.exit(main())
