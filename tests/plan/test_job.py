"""`cordee plan`: the figures, the pictures, a measured timeline, and every problem at once."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml

import pytest
from matplotlib.image import imread

from cordee.cli import main
from cordee.errors import ProblemError
from cordee.plan.job import plan
from cordee.plan.options import PlanConfig


def rows(printed: str) -> dict[str, list[str]]:
    """Cells of the printed table by schedule, whose name ends before two spaces."""
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  ") and "%" in line]
    return {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in lines}


def test_several_schedules_are_compared(capsys):
    assert main(["plan", "--schedule", "1f1b", "interleaved", "zbv", "--num-micro-batches", "8"]) == 0
    assert rows(capsys.readouterr().out) == {
        "1f1b": ["66", "1.000", "27.3%", "27.3%", "8"],
        "interleaved, 2 stages": ["57", "0.864", "15.8%", "15.8%", "11"],
        "zbv, 2 stages": ["51", "0.773", "5.9%", "5.9%", "8"],
    }


def test_every_schedule_is_simulated():
    names = "gpipe 1f1b interleaved interleaved_zero_bubble zbv dualpipev fold_aiao fold_fifo".split()
    timelines = plan(PlanConfig(schedule=tuple(names), reduction_time=1.0))
    assert [timeline.name.split(",")[0] for timeline in timelines] == names
    work = [sum(s.end - s.start for s in timeline.spans if s.action.kind != "R") for timeline in timelines]
    assert work == pytest.approx([8 * 8 * 3.0] * 8), "8 layers, 8 micro-batches, forward 1 and backward 2"
    exposed = {timeline.name.split(",")[0]: timeline.exposed_reduction for timeline in timelines}
    assert exposed["fold_aiao"] == exposed["fold_fifo"] == exposed["interleaved"] / 2


def test_manual_sizes_stand_beside_equal_ones(capsys):
    assert main(["plan", "--manual-mbs", "example-config-1"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["1f1b"][:3] == ["228", "1.000", "15.8%"]
    assert table["1f1b, example-config-1"][:3] == ["217", "0.952", "11.5%"]


def test_layers_and_times_are_given():
    config = PlanConfig(
        pipeline_model_parallel_size=2,
        num_layer_list="1,2",
        num_micro_batches=1,
        forward_time=2.0,
        backward_time=3.0,
        fixed_time=0.5,
        communication_time=0.25,
    )
    (timeline,) = plan(config)
    assert timeline.makespan == (2 + 4 + 3 + 6) + 4 * 0.5 + 2 * 0.25
    (zero,) = plan(PlanConfig(schedule=("interleaved_zero_bubble",), stages_per_rank=1, backward_input_time=0.5))
    assert {s.action.kind: s.end - s.start for s in zero.spans} == {"F": 1.0, "I": 0.5, "W": 1.5}


def test_svg_tells_all(tmp_path):
    path = tmp_path / "schedules.svg"
    assert main(["plan", "--schedule", "fold_aiao", "zbv", "--reduction-time", "2", "--output", str(path)]) == 0
    texts = [
        "".join(element.itertext()).strip() for element in xml.parse(path).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"fold_aiao, 2 stages", "zbv, 2 stages", "rank 0", "rank 3"} <= set(texts)
    assert {
        "forward",
        "backward",
        "input-gradient (dgrad) backward",
        "weight-gradient (wgrad) backward",
        "gradient reduction",
    } <= set(texts)
    assert texts.count("7") >= 4 * 4 + 4 * 6, "a number in every box: fold_aiao has 4 a rank, zbv 6"
    assert any("bubble" in text and "peak activations" in text for text in texts)


def test_png_is_a_picture(tmp_path):
    assert main(["plan", "--output", str(tmp_path / "made" / "one.png")]) == 0
    picture = imread(tmp_path / "made" / "one.png")
    assert picture.shape[1] == 2100
    colours = {tuple(round(255 * channel) for channel in pixel[:3]) for pixel in picture[::7, ::7].reshape(-1, 4)}
    assert {(0x2F, 0x6F, 0xAE), (0xD9, 0x77, 0x2B), (0xEC, 0xEC, 0xEC)} <= colours, "forward, backward, idle"


@pytest.fixture
def measured(tmp_path):
    """The simulated step as a run would write it: in seconds of a clock that began before."""
    (timeline,) = plan(PlanConfig())
    records = [
        {"rank": s.rank, "kind": s.action.kind, "stage": s.action.stage, "micro_batch": s.action.micro_batch}
        | {"start": 5 + s.start / 100, "end": 5 + s.end / 100}
        for s in timeline.spans
    ]
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps(records))
    return path


def test_a_measured_step_stands_beside_the_simulated_one(measured, tmp_path, capsys):
    simulated, found = plan(PlanConfig(timeline=str(measured)))
    assert found.measured and found.makespan == pytest.approx(simulated.makespan / 100)
    assert found.bubbles() == pytest.approx(simulated.bubbles())
    assert main(["plan", "--timeline", str(measured), "--output", str(tmp_path / "both.svg")]) == 0
    assert rows(capsys.readouterr().out)["measured"][0] == f"{simulated.makespan / 100:.4g}"
    assert "measured" in (tmp_path / "both.svg").read_text()


def found(config: PlanConfig) -> list[tuple[str, str]]:
    with pytest.raises(ProblemError) as caught:
        plan(config)
    return [(problem.option, problem.kind) for problem in caught.value.problems]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"rank": 0}]', "[]"])
def test_what_is_no_timeline(text, tmp_path):
    path = tmp_path / "timeline.json"
    path.write_text(text)
    assert [option for option, _ in found(PlanConfig(timeline=str(path)))] == ["--timeline"]


def test_records_that_make_no_sense(measured):
    good = json.loads(measured.read_text())
    for change in ({"kind": "X"}, {"end": 1.0}, {"rank": -1}, {"end": float("nan")}):
        measured.write_text(json.dumps([{**good[0], **change}, *good[1:]]))
        assert found(PlanConfig(timeline=str(measured))) == [("--timeline", "format")]


def test_a_timeline_without_time(measured):
    measured.write_text(json.dumps([{**record, "start": 1, "end": 1} for record in json.loads(measured.read_text())]))
    assert found(PlanConfig(timeline=str(measured))) == [("--timeline", "empty")]


def test_a_timeline_of_another_run(measured):
    assert found(PlanConfig(timeline=str(measured), pipeline_model_parallel_size=2)) == [("--timeline", "shape")]


def test_all_problems_at_once():
    with pytest.raises(ProblemError) as caught:
        plan(
            PlanConfig(
                schedule=("interleaved", "dualpipev", "1f1b"),
                num_micro_batches=7,
                num_layers=12,
                manual_mbs="1,2,3",
                backward_input_time=9.0,
            )
        )
    assert [(problem.option, problem.kind, problem.limit) for problem in caught.value.problems] == [
        ("--num-layers", "divisible", 8),
        ("schedule", "micro-batches", 8),
        ("--num-layers", "divisible", 8),
        ("--manual-mbs", "length", 7),
        ("--manual-mbs", "sum", 14),
        ("--backward-input-time", "at most", 2),
    ]


@pytest.mark.parametrize(
    ("given", "option", "kind"),
    [
        ({"manual_mbs": "a,b"}, "--manual-mbs", "list"),
        ({"manual_mbs": "1,2", "schedule": ("gpipe",)}, "--manual-mbs", "requires"),
        ({"num_layer_list": "1,x"}, "--num-layer-list", "invalid"),
        ({"num_layer_list": "0,0,0,0"}, "--num-layer-list", "invalid"),
        ({"num_layer_list": "1,1,1"}, "--num-layer-list", "length"),
        ({"num_layer_list": "1,1,1,1", "num_layers": 4}, "--num-layers", "excludes"),
        ({"stages_per_rank": 3}, "--stages-per-rank", "invalid"),
        ({"stages_per_rank": 1, "schedule": ("interleaved",)}, "schedule", "stages"),
        ({"timeline": "x.json", "schedule": ("gpipe", "1f1b")}, "--timeline", "requires"),
        ({"timeline": "absent.json"}, "--timeline", "format"),
        ({"output": "x.jpg"}, "--output", "format"),
        ({"output": "/dev/null/x.svg"}, "--output", "unwritable"),
        ({"schedule": ()}, "--schedule", "missing"),
    ],
)
def test_what_does_not_fit_is_said(given, option, kind):
    assert found(PlanConfig(**given)) == [(option, kind)]
