"""A comparison on a bucket: same report as in a folder, continued on another machine, with few requests and one owner."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvp_ray.cli.compare import describe_report
from hvp_ray.comparison import progress
from hvp_ray.comparison.inline_runs import Deaths, _problem_with, record_digest
from hvp_ray.comparison.progress import ProgressReader
from hvp_ray.comparison.report import Report, write_report
from hvp_ray.comparison.runner import is_done
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.comparison.study import Study, claim_comparison, open_study, read_costs
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import CheckpointError, ConfigError, LostRunError
from hvp_ray.files import Folder, join_uri, place_in
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.runs import ownership
from tests.helpers import tiny_config
from tests.s3_server import recorded_requests, s3_server
from tests.unit.runs.dying_run import train_and_die

Measure = Callable[[list[str]], dict[str, StepCost]]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as uri:
        yield uri


def _config(output: str) -> RunConfig:
    tracking = {"num_figure_images": 2, "selection_images_per_epoch": 64, "knn_every_epochs": 1}
    return tiny_config(output, data={"num_images": 100}, tracking=tracking)


def _costs(arms: list[str]) -> dict[str, StepCost]:
    numbers = dict.fromkeys(("render_cpu_seconds", "views_per_image", "forwards_per_image", "memory_bytes"), 1.0)
    steps = {"vanilla": 1.0, "hardest": 1.5, "random": 1.25}
    return {arm: StepCost(step_seconds=steps[arm], counted_operations=1.0, **numbers) for arm in arms}


def _must_not_measure(arms: list[str]) -> dict[str, StepCost]:
    raise AssertionError(f"the costs of {arms} are known")


def _open(base: RunConfig, measure: Measure, *arms: str) -> Study:
    return open_study(
        base,
        open_dataset(base.data),
        name="c",
        arm_names=arms or ("vanilla", "hardest"),
        seeds=(0,),
        accounting="measured",
        measure=measure,
    )


def _train(study: Study) -> None:
    for run in study.runs():
        if not is_done(run):
            pretrain_in_process(run.config, planned=run.identity)


def _files(place: str) -> dict[str, bytes | None]:
    folder = Folder(place)
    return {name: folder.read(name) for name in folder.names()}


@dataclasses.dataclass(frozen=True)
class _Both:
    in_folder: Report
    on_bucket: Report
    study: Study
    """On the bucket."""
    before: dict[str, bytes | None]
    """Files of the run that had finished before the machine died, as they were then."""


@pytest.fixture(scope="module")
def both(s3: str, tmp_path_factory: pytest.TempPathFactory) -> _Both:
    """A comparison in a folder, and on a bucket, whose machine died in the second run; another machine continued it."""
    tmp_path = tmp_path_factory.mktemp("both")
    folder = _open(_config(str(tmp_path / "runs")), _costs)
    _train(folder)
    base = _config(s3.format(""))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-a"))
        vanilla, hardest = _open(base, _costs).runs()
        pretrain_in_process(vanilla.config, planned=vanilla.identity)
        train_and_die(hardest.config, at_step=7, planned=hardest.identity)
        before = _files(vanilla.location)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-b"))
        study = _open(base, _must_not_measure)
        _train(study)
        return _Both(write_report(folder, metric="knn_top1"), write_report(study, metric="knn_top1"), study, before)


def test_report_on_a_bucket_equals_that_in_a_folder(both: _Both) -> None:
    """The report has the digests of all weights, so the bits are equal too."""
    remote = Folder(both.study.location)
    here, there = (
        json.loads(content) for content in (both.in_folder.json_path.read_bytes(), remote.read("report.json"))
    )
    for report in (here, there):
        report["settings"].pop("run.output")
    assert there == here
    assert len({run["weights_digest"] for run in there["runs"]}) == 2
    assert there["selection"] and there["runs"][1]["curve"]


def test_page_and_figures_are_on_the_bucket_and_in_a_copy(both: _Both) -> None:
    remote = Folder(both.study.location)
    page = remote.read("report.html")
    assert page == both.on_bucket.html_path.read_bytes()
    figures = {name: remote.read(name) for name in remote.names("figures")}
    assert "figures/candidate_views.png" in figures
    assert {f"figures/{path.name}" for path in both.in_folder.figures} == set(figures)
    assert page is not None and page.count(b"data:image/png;base64,") == len(figures)
    assert b'src="http' not in page and b'href="http' not in page
    remote.write("figures/of_an_earlier_report.png", b"")
    write_report(both.study, metric="knn_top1")
    assert set(remote.names("figures")) == set(figures)
    said = describe_report(both.on_bucket)
    assert f"report   {place_in(both.study.location, 'report.html')}\n" in said
    assert said.endswith(f"copy     {both.on_bucket.html_path}")


def test_another_machine_repeats_no_finished_run_and_resumes_the_other(both: _Both) -> None:
    vanilla, hardest = both.study.runs()
    assert _files(vanilla.location) == both.before
    summary = json.loads(Folder(hardest.location).read("summary.json") or b"")
    assert summary["num_resumes"] == 1


def test_costs_are_read_from_a_uri(both: _Both, s3: str) -> None:
    assert read_costs(place_in(both.study.location, "comparison.json"), both.study.base) == both.study.costs
    with pytest.raises(ConfigError, match="is no comparison.json"):
        read_costs(join_uri(s3.format(""), "nothing.json"), both.study.base)


def test_progress_asks_a_bucket_rarely_whatever_the_number_of_calls(
    both: _Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanilla, hardest = both.study.runs()
    reader = ProgressReader([vanilla, hardest], done=[vanilla.name])
    with recorded_requests() as requests:
        found = [reader.read([hardest.name]) for _ in range(1000)]
        assert requests == []
        assert found[-1].steps_done == vanilla.num_steps + hardest.num_steps
        assert found[-1].running == {hardest.name: 1.0} and found[-1].num_done == 1
        monkeypatch.setattr(progress, "_BUCKET_SECONDS", 0.0)
        rare = ProgressReader([vanilla, hardest], done=[vanilla.name])
        requests.clear()
        for _ in range(10):
            rare.read([hardest.name])
        assert all(f"/{hardest.name}/" in request.replace("%2F", "/") for request in requests)
        assert 20 <= len(requests) <= 40, "a list and a read, which first asks for the size"
    reader.note_end(hardest.name)
    assert reader.read([]).num_done == 2


def test_progress_survives_an_outage(both: _Both, monkeypatch: pytest.MonkeyPatch) -> None:
    _, hardest = both.study.runs()
    monkeypatch.setattr(progress, "_BUCKET_SECONDS", 0.0)
    reader = ProgressReader([hardest], done=[])

    def fail(_run: str) -> int:
        raise OSError("no route")

    monkeypatch.setattr(progress, "last_recorded_step", fail)
    assert reader.read([hardest.name]).steps_done == hardest.num_steps


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that no other test uses."""
    if request.param == "disk":
        return str(tmp_path / "place")
    uri: str = request.getfixturevalue("s3")
    return join_uri(uri.format(""), tmp_path.name)


def test_starter_that_waited_for_another_one_takes_its_costs(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one measures and writes between this one's first look and its claim."""
    base, other = _config(place), []

    def be_overtaken(location: str) -> ownership.RunClaim:
        monkeypatch.setattr("hvp_ray.comparison.study.claim_comparison", claim_comparison)
        other.append(_open(base, _costs))
        return claim_comparison(location)

    monkeypatch.setattr("hvp_ray.comparison.study.claim_comparison", be_overtaken)
    assert _open(base, _must_not_measure).costs == other[0].costs


def test_second_starter_is_refused_while_the_first_one_lives(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_PATIENCE_SECONDS", 1.0)
    study = _open(_config(place), _costs)
    before = Folder(study.location).read("comparison.json")
    with claim_comparison(study.location) as first:
        with pytest.raises(CheckpointError, match=r"is doing the comparison .*take another --comparison NAME"):
            claim_comparison(study.location)
        with pytest.raises(CheckpointError, match="is doing the comparison"):
            _open(_config(place), _costs, "vanilla", "hardest", "random")  # would add costs
        first.raise_if_lost()
    assert Folder(study.location).read("comparison.json") == before
    _open(_config(place), _costs, "vanilla", "hardest", "random")


def test_starter_that_was_succeeded_ends(place: str) -> None:
    study = _open(_config(place), _costs)
    with claim_comparison(study.location) as first:
        later = f"owner/{first.number + 1:08d}-{'0' * 16}.json"
        Folder(study.location).write(later, b"{}")
        with pytest.raises(LostRunError, match="has taken over the comparison .*this process ends"):
            first.check()


def test_node_that_does_not_see_the_comparison_says_so(place: str, tmp_path: Path) -> None:
    study = _open(_config(place), _costs)
    digest = record_digest(study)
    assert _problem_with(study.location, digest) is None
    found = _problem_with(place_in(place, "elsewhere"), digest)
    assert found is not None and "there is no " in found
    assert ("Every node needs access to the bucket" if "://" in place else "do not share this folder") in found
    Folder(study.location).write("comparison.json", b"{}")
    assert "another one is there" in (_problem_with(study.location, digest) or "")
    missing = dataclasses.replace(study, location=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="there is no .*start the comparison again"):
        record_digest(missing)


def test_deaths_count_only_while_no_new_step_is_recorded() -> None:
    """By hand: a spot node each at steps 0, 8 and 16, then a step that kills its process."""
    deaths, counts = Deaths(), []
    for step in (0, 8, 16, 12, -1, 16):  # an attempt may die earlier than the one before, or the log be out of reach
        assert not deaths.are_too_many
        deaths.note(step)
        counts.append(deaths.number)
    assert counts == [1, 1, 1, 2, 3, 4]
    assert deaths.are_too_many and deaths.furthest_step == 16
