"""Pretrain an encoder with hard views, on the Ray cluster that the program is submitted to, or on a local Ray.

hvp-ray pretrain [RECIPE] [--arm ARM] [--section.field VALUE ...]
"""

import os
import sys
import time
from typing import Any

from hvp_ray.cli.command_line import ArmOptions, exit_status, parse_run, say
from hvp_ray.config import RunConfig
from hvp_ray.launch.environment import prepare_ray_environment

Options = ArmOptions

_LINE_SECONDS = 10.0


class _TimeLeft:
    """Estimates from the steps done since the first report how long the others take."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def minutes_left(self, steps_done: int, num_steps: int) -> str:
        """Return ", about N min left"; empty: not known yet, or nothing is left."""
        now = time.monotonic()
        if self._first is None:
            self._first = steps_done, now
        done, seconds = steps_done - self._first[0], now - self._first[1]
        if done < 1 or seconds < _LINE_SECONDS or steps_done >= num_steps:
            return ""
        return f", about {max(1, round(seconds / done * (num_steps - steps_done) / 60))} min left"


class Display:
    """Shows a progress bar on a terminal, and otherwise a line every ten seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._line_at = 0.0
        self._is_terminal = sys.stderr.isatty()
        self._first_step = 0
        self._clock = _TimeLeft()

    def announce(self, announcement: Any) -> None:
        """Show what will run."""
        job = announcement.job
        resolved, cluster = job.resolved, job.config.cluster
        work = f"rendering with {resolved.renderer}"
        if cluster.num_finishers:
            work = f"decoding for {cluster.num_trainers * cluster.num_finishers} view finisher(s) beside the trainers"
        say(f"run      {job.run_name}")
        say(f"folder   {job.location}")
        for line in job.inventory.lines():
            say(line)
        say(
            f"on       {'the Ray cluster it was submitted to' if announcement.joined_cluster else 'a local Ray'}: "
            f"{cluster.num_trainers} trainer(s) on {resolved.device}, {resolved.num_view_workers} view worker(s) {work}, "
            f"at most {announcement.prefetch_bytes / 2**20:.1f} MiB of views in flight"
        )

    def show_progress(self, progress: Any) -> None:
        """Show steps, loss, images/s and data wait; first, the step of the checkpoint that an attempt resumed from."""
        if progress.first_step != self._first_step:
            self._first_step = progress.first_step
            self.show_message(f"continued from the checkpoint of step {progress.first_step}")
        text = (
            f"loss {progress.loss:.4f}, {progress.images_per_second:.0f} images/s, "
            f"data wait {progress.data_wait_fraction:.1%}"
        )
        left = self._clock.minutes_left(progress.steps_done, progress.num_steps)
        if self._is_terminal:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=progress.num_steps, unit="step", dynamic_ncols=True)
            self._bar.n = progress.steps_done
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._line_at > _LINE_SECONDS or progress.steps_done == progress.num_steps:
            self._line_at = time.monotonic()
            say(f"step {progress.steps_done}/{progress.num_steps}, epoch {progress.epoch:.2f}: {text}{left}")
        if progress.steps_done == progress.num_steps:
            self.close()
            say("training is done; evaluating and drawing figures ...")

    def show_message(self, message: str) -> None:
        """Show a warning between the lines of progress."""
        if self._bar is not None:
            self._bar.clear()
        say(message)

    def close(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def describe_result(summary: dict[str, Any], config: RunConfig, location: str, tracking_uri: str | None) -> str:
    """Return the result of a run, and where its files are.

    Args:
        summary: summary of the run.
        config: its settings.
        location: its folder, path or URI.
        tracking_uri: URI of MLflow. None: MLflow is off.
    """
    from hvp_ray.files import place_in
    from hvp_ray.runs.versions import describe_versions

    lines = [
        "",
        f"finished: {summary['num_steps']} steps, {summary['num_epochs']:.1f} epochs, {summary['images_seen']} images "
        f"in {summary['train_seconds']:.0f} s of training ({summary['images_per_second']:.0f} images/s, "
        f"data wait {summary['data_wait_fraction']:.1%}, spilled {summary['spilled_bytes']} bytes)",
        f"loss     {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}"
        f"{' (-1 is the best)' if config.method.name == 'simsiam' else ''}",
    ]
    if summary.get("chosen_iou_mean") is not None and summary.get("other_iou_mean") is not None:
        lines.append(
            f"overlap  of the chosen pair's crops {summary['chosen_iou_mean']:.3f}, "
            f"of the other pairs {summary['other_iou_mean']:.3f} (IoU, mean over recorded hard steps)"
        )
    lines += _describe_knn(summary, config.views.global_views.size_px)
    warnings = summary.get("num_collapse_warnings")
    if warnings is not None:
        lines += ["", f"collapse {'no warning' if not warnings else f'{warnings} warning(s), see above'}"]
    if summary["num_unreadable_images"]:
        lines += [
            "",
            f"{summary['num_unreadable_images']} image(s) were unreadable and replaced: see log/*/unreadable-rank-*.jsonl",
        ]
    if (versions := describe_versions(summary.get("other_versions"))) is not None:
        lines += ["", f"versions {versions}"]
    problems = summary.get("problems", [])
    lines += [*([""] if problems else []), *(f"problem  {problem}" for problem in problems)]
    lines += [""]
    if config.tracking.num_figure_images:
        lines.append(f"page     {place_in(location, 'report.html')}")
    lines += [
        f"summary  {place_in(location, 'summary.json')}",
        f"encoder  {place_in(location, 'backbone.safetensors')}",
        f"figures  {place_in(location, 'figures')}",
    ]
    if tracking_uri is not None:
        lines.append(f"curves   {_describe_mlflow(tracking_uri, summary.get('mlflow_experiment_id'))}")
    elif config.tracking.uri == "auto":
        lines.append("curves   metrics.jsonl in that folder; for all runs on one page: pip install 'hvp-ray[mlflow]'")
    if "tensorboard" in config.tracking.loggers:
        lines.append(f"curves   `tensorboard --logdir {place_in(location, 'tensorboard')}`")
    if "wandb" in config.tracking.loggers:
        offline = place_in(location, "wandb", "offline-run-*")
        lines.append(
            f"curves   W&B, project {config.tracking.experiment}; after WANDB_MODE=offline: `wandb sync {offline}`"
        )
    return "\n".join(lines)


def _describe_knn(summary: dict[str, Any], size_px: int) -> list[str]:
    from hvp_ray.evaluation.report import title_of_pixels

    rows = {"": "trained encoder", "_untrained": "untrained encoder", "_pixels": title_of_pixels(size_px)}
    if all(summary.get(f"knn_top1{suffix}") is None for suffix in rows):
        return []
    lines = ["", "k-NN accuracy           all labels   5 labels per class"]
    for suffix, title in rows.items():
        values = summary[f"knn_top1{suffix}"], summary[f"knn5shot_top1{suffix}"]
        top1, few = ("not known" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"  {title:<20}    {top1:<10}   {few}")
    return lines


def _describe_mlflow(tracking_uri: str, experiment: str | None) -> str:
    from hvp_ray.tracking.mlflow_store import ui_command

    if experiment is None:
        return "MLflow was unreachable; start the run again with its name to send them"
    page = f"/#/experiments/{experiment}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    if tracking_uri.startswith(("http://", "https://")):
        # A browser outside the cluster may know the server by another name than the nodes.
        return f"{os.environ.get('HVP_MLFLOW_PAGE', tracking_uri).rstrip('/')}{page}"
    return f"`{ui_command(tracking_uri)}`, then http://127.0.0.1:5000{page}"


def show_finished(config: RunConfig) -> bool:
    """Show the result of a run of this name that has finished; return whether there is one.

    Raises:
        HvpRayError: the finished run has other settings.
    """
    from hvp_ray.files import place_in
    from hvp_ray.runs.backfill import send_missing_records
    from hvp_ray.runs.location import local_output, mlflow_location, output_location
    from hvp_ray.runs.record import finished_summary

    summary = finished_summary(config)
    if summary is None or config.run.name is None:
        return False
    say(f"the run {config.run.name} has ended already; choose another --run.name for a new one")
    sent = send_missing_records(config)
    if sent is not None:
        say("a tracker lacked some of its records; they have been sent")
        summary = sent
    location, uri = place_in(output_location(config), config.run.name), mlflow_location(config, local_output(config))[0]
    say(describe_result(summary, config, location, uri))
    return True


def pretrain(arguments: list[str], display: Display) -> None:
    """Run to the end and show the result.

    Raises:
        HvpRayError: the message tells the user what to do.
    """
    config = parse_run(arguments, program="hvp-ray pretrain", description=__doc__ or "")
    prepare_ray_environment()
    if show_finished(config):
        return
    from hvp_ray.launch.driver import launch
    from hvp_ray.launch.watch import Watchers

    watchers = Watchers(
        announce=display.announce, show_progress=display.show_progress, show_message=display.show_message
    )
    try:
        summary, job = launch(config, watchers)
    finally:
        display.close()
    say(describe_result(summary, config, job.location, job.mlflow_uri))


def main(arguments: list[str]) -> int:
    """Run; return the exit status."""
    stopped = "stopped; start the run again with its --run.name to continue"
    return exit_status(lambda: pretrain(arguments, Display()), stopped=stopped)
