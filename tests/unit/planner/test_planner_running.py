"""Mixed devices, online calibration, the planning process, the command and the configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from ltrain.config.base import ConfigError
from ltrain.config.planner import AssignmentConfig, PlannedAssignment, StaticAssignment
from ltrain.planner import ClusterSpec, CostModel, Link, Node, command, plan_batch
from ltrain.planner.ahead import PlanAhead
from ltrain.planner.calibrate import OnlineCalibration
from ltrain.planner.evaluate import group_seconds
from ltrain.planner.groups import rank_tasks
from ltrain.planner.mixes import mix
from ltrain.planner.setup import check_longest, cluster_of, cost_model, plan_options
from ltrain.planner.work import DensityWork

COST = CostModel(5e-9, 1.8e-4, 0.05, 2e6)
FAST = Node(2, Link(200.0), Link(5.0), "fast", speed=3.0, tokens_per_device=4000)
SLOW = Node(2, Link(100.0), Link(5.0), "slow", speed=1.0, tokens_per_device=1000)
MIXED = ClusterSpec((FAST, SLOW))
UNIFORM = ClusterSpec.uniform(8, 4, 100.0, 5.0, 1000)


def test_faster_devices_get_more_work() -> None:
    lengths = [400] * 24
    plan = plan_batch(lengths, MIXED, COST)
    plan.validate(lengths)
    tokens = {
        rank: sum(t.shard_lengths[t.member] for t in rank_tasks(plan, rank, 1) if t.group)
        for rank in range(4)
    }
    assert tokens[0] + tokens[1] > 2 * (tokens[2] + tokens[3])


def test_a_mixed_group_has_shards_by_speed_or_memory() -> None:
    lengths = [9500]
    plan = plan_batch(lengths, MIXED, COST)
    plan.validate(lengths)
    (group,) = plan.micro_batches[0]
    assert group.ranks == (0, 1, 2, 3) and group.schedule == "ring"
    assert group.weights[0] > group.weights[3]
    shards = rank_tasks(plan, 0, 1)[0].shard_lengths
    assert shards[0] <= 4000 and shards[3] <= 1000 and sum(shards) == 9500
    even = ClusterSpec((SLOW, SLOW))
    with pytest.raises(ConfigError, match="4000 tokens"):
        plan_batch(lengths, even, COST)


def test_calibration_finds_a_slower_machine_and_improves_the_prediction() -> None:
    truth = COST.scaled(1.6, 2.4, 3.0, 1.0)
    calibration = OnlineCalibration(UNIFORM, COST)
    errors = []
    for seed in range(4):
        plan = plan_batch(mix("commoncrawl").draw(60, 6000, seed), UNIFORM, calibration.cost)
        measured = [
            [group_seconds(g, plan.lengths, UNIFORM, truth).total for g in groups]
            for groups in plan.micro_batches
        ]
        worst = max(
            abs(g.predicted_s / m - 1)
            for groups, times in zip(plan.micro_batches, measured, strict=True)
            for g, m in zip(groups, times, strict=True)
        )
        errors.append(worst)
        calibration.observe(plan, measured)
    assert errors[0] > 0.4 and errors[-1] < 0.05
    assert calibration.predicted_over_measured() == pytest.approx(1.0, abs=0.03)


def test_calibration_skips_missing_times_and_refuses_other_shapes() -> None:
    calibration = OnlineCalibration(UNIFORM, COST)
    plan = plan_batch([100, 200], UNIFORM, COST)
    calibration.observe(plan, [[0.0] * len(groups) for groups in plan.micro_batches])
    assert calibration.cost == COST
    with pytest.raises(ValueError, match="measured_s"):
        calibration.observe(plan, [])


def test_plans_from_the_other_process_are_the_plans_of_this_one() -> None:
    lengths = {step: mix("github").draw(50, 7000, step) for step in range(3)}
    sparse = CostModel(5e-9, 1.8e-4, 0.05, 2e6, work=DensityWork(0.2))
    with PlanAhead(UNIFORM, sparse, timeout_s=60) as ahead:
        for step, batch in lengths.items():
            ahead.submit(step, batch)
        with pytest.raises(ValueError, match="submitted"):
            ahead.submit(0, [1])
        for step in (1, 0, 2):
            plan = ahead.take(step)
            assert plan == plan_batch(lengths[step], UNIFORM, sparse) and not plan.notes and plan.solve_s > 0
        with pytest.raises(KeyError):
            ahead.take(7)


def test_a_process_that_dies_is_replaced_and_its_steps_planned_greedily() -> None:
    with PlanAhead(UNIFORM, COST, timeout_s=60) as ahead:
        ahead.submit(0, [100])
        ahead.take(0)
        process = ahead._process
        process.kill()
        process.wait()
        ahead.submit(1, [300, 500, 20])
        first = ahead.take(1)
        first.validate([300, 500, 20])
        ahead.submit(2, [300, 500])
        assert ahead.take(2).notes == ()
        assert not first.notes or "died" in first.notes[0]


def test_a_late_plan_is_replaced_by_the_greedy_one_and_logged(caplog) -> None:
    with PlanAhead(UNIFORM, COST, timeout_s=1e-4) as ahead:
        batch = mix("wikipedia").draw(200, 4000, 0)
        ahead.submit(0, batch)
        plan = ahead.take(0)
        plan.validate(batch)
        assert (
            plan.solver == "greedy" and "no plan within" in plan.notes[0] and "no plan within" in caplog.text
        )


def test_bad_lengths_reach_the_caller() -> None:
    with PlanAhead(UNIFORM, COST, timeout_s=60) as ahead:
        ahead.submit(0, [10**9])
        with pytest.raises(ConfigError, match="1000000000"):
            ahead.take(0)


def test_the_planner_imports_no_torch() -> None:
    code = (
        "import sys, ltrain.planner, ltrain.planner.worker, ltrain.planner.command, ltrain.planner.setup; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_prints_the_plan_and_its_rivals_and_writes_files(tmp_path, capsys) -> None:
    UNIFORM.save(tmp_path / "cluster.json")
    code = command.run(
        cluster_path=tmp_path / "cluster.json",
        cost=COST,
        mix_name="github",
        num_sequences=60,
        out_png=tmp_path / "plan.png",
        out_json=tmp_path / "plan.json",
    )
    out = capsys.readouterr().out
    assert code == 0 and "best static" in out and "Megatron" in out and "micro-batch" in out
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG" and (
        tmp_path / "plan.json"
    ).stat().st_size > 100


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lengths": [10**8]}, "100000000"),
        ({}, "mix must be given"),
        ({"mix_name": "books"}, "books"),
        ({"lengths": [5], "world_size": 4}, "4 shards"),
        ({"lengths": [5], "cost": {"speed": 1}}, "cost"),
        ({"lengths_path": "/nowhere"}, "nowhere"),
    ],
)
def test_the_command_exits_with_2_on_bad_input(tmp_path, capsys, arguments, match) -> None:
    UNIFORM.save(tmp_path / "cluster.json")
    code = command.run(**{"cluster_path": tmp_path / "cluster.json", "cost": COST, **arguments})
    assert code == 2 and match in capsys.readouterr().err


def test_lengths_come_from_lists_and_lines(tmp_path) -> None:
    (tmp_path / "a").write_text("[3, 4]")
    (tmp_path / "b").write_text("3\n4\n")
    (tmp_path / "c").write_text("3 x")
    assert command.read_lengths(str(tmp_path / "a")) == command.read_lengths(str(tmp_path / "b")) == [3, 4]
    with pytest.raises(ConfigError, match="whole numbers"):
        command.read_lengths(str(tmp_path / "c"))


def section(**changes) -> PlannedAssignment:
    cost = {"kind": "given", "attention_s": 5e-9, "linear_s": 1.8e-4, "fixed_s": 0.05, "bytes_per_token": 2e6}
    uniform = {"kind": "uniform", "tokens_per_device": 1000}
    return TypeAdapter(AssignmentConfig).validate_python(
        {"kind": "planned", "cluster": uniform, "cost": cost, **changes}
    )


def test_the_section_gives_the_planner_its_inputs(tmp_path) -> None:
    made = section(degrees=[1, 2, 4], time_limit_s=2.0, schedules=["ring"])
    cost = cost_model(made, num_heads=8, num_kv_heads=2)
    assert cost.schedules == ("ring",) and cost.num_kv_heads == 2 and cost.attention_s == 5e-9
    assert plan_options(made, 128) == {
        "solver": "auto",
        "time_limit_s": 2.0,
        "degrees": (1, 2, 4),
        "block": 128,
    }
    UNIFORM.save(tmp_path / "cluster.json")
    with pytest.raises(ConfigError, match="shards of the run"):
        cluster_of(section(cluster={"kind": "file", "path": str(tmp_path / "cluster.json")}), 4)
    cluster = cluster_of(made, 4)
    assert cluster.num_devices == 4 and len(cluster.nodes) == 1
    check_longest("document", 3584, made, cluster, cost, 128)
    with pytest.raises(ConfigError, match=r"needs 3585 tokens.*longest sequence that fits has 3584"):
        check_longest("document", 3585, made, cluster, cost, 128)
    assert isinstance(TypeAdapter(AssignmentConfig).validate_python({"kind": "static"}), StaticAssignment)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "magic"},
        {"schedules": []},
        {"degrees": []},
        {"ahead": 0},
        {"unknown": 1},
        {"cluster": {"kind": "uniform"}},
        {
            "cost": {
                "kind": "given",
                "attention_s": 1,
                "linear_s": 1,
                "bytes_per_token": 1,
                "memory_level": "x",
            }
        },
    ],
)
def test_bad_sections_are_refused(changes) -> None:
    with pytest.raises((ValidationError, ConfigError)):
        section(**changes)
