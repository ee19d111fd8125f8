"""Every metric of a run, once: its unit, its meaning, its healthy range, and the remedy outside that range.

`docs/generate.py` writes `docs/metrics.md` from this table. `stream/metrics.py` publishes TRAINER_METRICS and
WORKER_METRICS. Texts are Markdown. Seconds are wall time unless the meaning says CPU time.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, or a value of the summary."""

    unit: str
    """Unit; empty: it has none."""

    meaning: str

    healthy: str = ""
    """Values to expect; empty: any."""

    remedy: str = ""
    """What to check or change otherwise."""

    kind: Literal["counter", "gauge", "histogram"] = "gauge"
    """Kind of the published metric. A recorded value is a gauge."""


_counter = partial(Metric, kind="counter")

RECORDED: dict[str, Metric] = {
    "train/loss": Metric(
        "",
        "Loss on the chosen views, mean over all trainers.",
        "Falls. Higher than with random views, because the pairs are harder. SimSiam: from 0 towards -1, not at -1 "
        "within the first epochs.",
        "Rises from the start: lower `optimizer.learning_rate_per_256`. At its minimum at once: see `collapse/`.",
    ),
    "train/learning_rate": Metric("", "Learning rate of the scheduled parameters.", "Rises in warm-up, then falls."),
    "train/gradient_norm": Metric(
        "",
        "Global gradient norm before clipping. Recorded if clipping is on.",
        "Steady, mostly below `optimizer.clip_gradient_norm`.",
        "Peaks: lower the learning rate. A non-finite loss stops the run before the update.",
    ),
    "train/epoch": Metric("epochs", "Epochs done.", "Grows."),
    "train/class_loss": Metric("", "iBOT: class-token part of the loss.", "Falls.", "See `train/loss`."),
    "train/patch_loss": Metric(
        "", "iBOT: masked-patch part of the loss.", "Falls.", "0: no view is masked, see `views.masks`."
    ),
    "selection/chosen_score": Metric(
        "",
        "Loss of the chosen candidate in the scoring pass, mean over images.",
        "Above `selection/other_score` with rule `hardest`.",
        "Equal: nothing to choose. Use more views, or stronger augmentation.",
    ),
    "selection/other_score": Metric("", "Mean loss of the other candidates.", "Below `selection/chosen_score`."),
    "selection/mean_score": Metric(
        "", "Mean loss of all candidates, if the step scores and its rule ignores the scores.", "Falls."
    ),
    "selection/chosen_iou": Metric(
        "fraction",
        "Overlap (IoU) of the chosen pair's crops, mean over images.",
        "Below `selection/other_iou` (SimSiam on photographs: 0.35 against 0.49). DINO on small images: about equal.",
        "Far below 0.2: pairs share nothing. Raise the minimum of `crop_scale`, or use `selection.every`.",
    ),
    "selection/other_iou": Metric(
        "fraction", "Mean overlap of the other pairs.", "Constant for given data and crop settings."
    ),
    "selection/min_iou_share": Metric(
        "fraction",
        "Share of images whose chosen pair also has the least overlap.",
        "0.25 to 0.45 with 4 views. Chance is 1 / pairs.",
        "Near 1: `selection.rule=min_iou` chooses the same pairs without scoring.",
    ),
    "selection/chosen_color_distance": Metric(
        "",
        "Distance of the chosen pair's colour factors (brightness, contrast, saturation, hue), neutral without jitter.",
        "Somewhat above `selection/other_color_distance`.",
        "Far above: only colour makes pairs hard. Use weaker jitter.",
    ),
    "selection/other_color_distance": Metric(
        "", "Mean colour distance of the other pairs.", "Constant for given augmentation."
    ),
    "selection/unmasked_share": Metric(
        "fraction",
        "iBOT: share of chosen global views without a mask.",
        "Near `selection/unmasked_share_offered`.",
        "Far below: hard views raise the masking rate. `method.scoring=class` ignores masks.",
    ),
    "selection/unmasked_share_offered": Metric(
        "fraction", "iBOT: share of candidate global views without a mask.", "As set in `views.masks`."
    ),
    "collapse/embedding_std": Metric(
        "",
        "Standard deviation of the normalised embeddings x sqrt(D).",
        "0.5 to 1. A warning below 0.1.",
        "Lower the learning rate, look for near-duplicates in the data, or train on easier views.",
    ),
    "collapse/effective_rank": Metric(
        "dimensions",
        "Dimensions in use: exp of the entropy of the embeddings' singular values. Every tenth record.",
        "Grows or stays, well above 1.",
        "Near 1: see `collapse/embedding_std`.",
    ),
    "collapse/teacher_entropy": Metric(
        "nats",
        "DINO, iBOT: mean entropy of the teacher's output.",
        "Between 0 (one prototype) and log(prototypes) (uniform). Falls slowly.",
        "At either end: check the teacher's temperature and the centre's momentum.",
    ),
    "collapse/teacher_information": Metric(
        "nats",
        "DINO, iBOT: entropy of the mean output minus the mean entropy. What the output says about the image.",
        "Grows. A warning below 0.02 after 100 steps.",
        "See `collapse/teacher_entropy`.",
    ),
    "eval/knn_top1": Metric(
        "fraction",
        "k-NN accuracy of the frozen encoder on test images, all labels (cosine, temperature 0.07).",
        "Rises.",
        "Falls while the loss falls: collapse, or views too hard.",
    ),
    "eval/knn5shot_top1": Metric(
        "fraction", "k-NN accuracy with 5 labels per class, mean over 20 fixed draws.", "Rises.", "See `eval/knn_top1`."
    ),
    "perf/images_per_second": Metric(
        "images/s",
        "Images trained on by all trainers, over the last interval.",
        "Steady.",
        "Drops: `perf/wait_seconds` says if views are missing. Otherwise another process uses the CPU or GPU.",
    ),
    "perf/step_seconds": Metric("s", "Duration of a step.", "Steady.", "See `perf/images_per_second`."),
    "perf/wait_seconds": Metric(
        "s",
        "Time that a step waited for its batch.",
        "Below 2 % of `perf/step_seconds`.",
        "Always: more view workers. Now and then: raise `cluster.batches_in_flight`.",
    ),
    "stream/views_per_second_per_worker": Metric(
        "views/s",
        "Rendering speed of a view worker, mean over workers.",
        "Steady.",
        "Falls: overloaded nodes, or slow storage.",
    ),
    "stream/bytes": Metric(
        "bytes", "Pixels that view workers sent to rank 0 so far: views, or decoded images.", "Grows evenly."
    ),
    "stream/retries": Metric(
        "batches",
        "Batches that rank 0 retried so far, because a worker died or was late.",
        "0, or a few if nodes come and go.",
        "See `num_batches_repeated`.",
    ),
}
"""Curves in `metrics.jsonl` and MLflow. A slash makes a section in MLflow."""

SUMMARY: dict[str, Metric] = {
    "run_name": Metric("", "Name of the run."),
    "recipe": Metric("", "Recipe. `config.json` has every setting."),
    "method": Metric("", "Method."),
    "selection_rule": Metric("", "Rule that chose the views."),
    "seed": Metric("", "Seed of the run."),
    "renderer": Metric("", "Renderer in use."),
    "device": Metric("", "Device of the trainers."),
    "num_trainers": Metric("trainers", "Number of trainers."),
    "run_identity": Metric(
        "",
        "Digest of everything that may change a bit of the weights.",
        "Equal for runs that must be equal.",
        "A resume under another identity or evaluation is refused, with the difference.",
    ),
    "weights_digest": Metric(
        "",
        "SHA-256 of the final weights.",
        "Equal for equal identities on CPUs.",
        "It may differ with another kind of CPU, another torch build, or elastic trainers.",
    ),
    "num_steps": Metric("steps", "Optimizer steps of the whole run."),
    "num_epochs": Metric("epochs", "Epochs of the whole run."),
    "images_seen": Metric("images", "Images trained on in the whole run, repeats counted."),
    "data": Metric(
        "",
        "Contents of the sources: images, classes, bytes, and everything left out with reason and example.",
        "As you expect.",
        "An unsupported kind of file, or a wrong folder.",
    ),
    "num_training_images": Metric(
        "images", "Images in the training part.", "As you expect.", "`data.num_images`, `data.test_fraction`."
    ),
    "train_seconds": Metric("s", "Time from the first batch to the last step."),
    "images_per_second": Metric(
        "images/s",
        "Training speed of all trainers over `train_seconds`.",
        "Near the demand given to `pipelines/describe.py`.",
        "Check `data_wait_fraction`, then `step_seconds_median`.",
    ),
    "first_batch_seconds": Metric(
        "s",
        "Time from the first request to the first batch, start of view workers included.",
        "Seconds.",
        "Minutes: view nodes open the data slowly.",
    ),
    "data_wait_fraction": Metric(
        "fraction",
        "Share of `train_seconds` that the trainer waited for views.",
        "Below 0.02.",
        "Above 0.05: more view workers. If these are idle: `cluster.batches_in_flight`, then the network.",
    ),
    "step_seconds_median": Metric("s", "Median duration of a step.", "Steady over runs."),
    "peak_memory_bytes": Metric(
        "bytes",
        "Peak GPU memory of rank 0, or main memory of its process if it trains on a CPU.",
        "Below the device's memory.",
        "Raise `training.accumulation_steps`, or render smaller views.",
    ),
    "view_bytes": Metric(
        "bytes",
        "Pixels that view workers sent to rank 0: views, or decoded images.",
        "As predicted by `pipelines/describe.py`.",
    ),
    "spilled_bytes": Metric(
        "bytes",
        "Bytes that the object stores spilled to disk during the run.",
        "0.",
        "Lower `cluster.batches_in_flight`, or enlarge the store.",
    ),
    "num_batches_repeated": Metric(
        "batches",
        "Batches that rank 0 retried.",
        "0, or a few per lost node.",
        "Many without deaths: raise `cluster.late_seconds`, or find the slow node.",
    ),
    "num_worker_restarts": Metric(
        "restarts",
        "Restarts of view workers by Ray.",
        "0.",
        "Read the nodes' logs: out of memory, a preempted node, a crashing decoder.",
    ),
    "num_resumes": Metric(
        "attempts",
        "Attempts after the first.",
        "0.",
        "`attempts.jsonl` says when and on which machine. The trainers' log has the reason.",
    ),
    "num_unreadable_images": Metric(
        "images",
        "Distinct images that were replaced.",
        "0.",
        "`unreadable-rank-*.jsonl` lists them. Above `data.max_unreadable_fraction` the run stops.",
    ),
    "num_quarantined_images": Metric(
        "images",
        "Of the replaced images, those that crash the decoder.",
        "0.",
        "Remove them: each costs three worker deaths in every attempt.",
    ),
    "num_collapse_warnings": Metric("warnings", "Warnings of collapse.", "0.", "See `collapse/`."),
    "loss_first": Metric("", "First recorded loss."),
    "loss_last": Metric("", "Last recorded loss.", "Below `loss_first`.", "See `train/loss`."),
    "chosen_iou_mean": Metric("fraction", "Mean of `selection/chosen_iou` over the run."),
    "other_iou_mean": Metric("fraction", "Mean of `selection/other_iou` over the run."),
    "knn_top1": Metric(
        "fraction",
        "k-NN accuracy of the final encoder, all labels.",
        "Above the untrained encoder and raw pixels.",
        "Trained too short, collapsed, or crops that show no object. `null`: no usable labels.",
    ),
    "knn5shot_top1": Metric(
        "fraction", "k-NN accuracy of the final encoder, 5 labels per class.", remedy="See `knn_top1`."
    ),
    "knn_top1_untrained": Metric("fraction", "`knn_top1` of the encoder before training."),
    "knn5shot_top1_untrained": Metric("fraction", "`knn5shot_top1` of the encoder before training."),
    "knn_top1_pixels": Metric(
        "fraction",
        "`knn_top1` of raw pixels, scaled to 32 px if larger.",
        "Below the trained encoder, except on the embedded digits, which are too easy.",
    ),
    "knn5shot_top1_pixels": Metric("fraction", "`knn5shot_top1` of raw pixels."),
    "problems": Metric(
        "",
        "Failures during or after training, one sentence each: an evaluation, a figure.",
        "An empty list.",
        "The failed values are `null`. The weights are complete. `pipelines/evaluate.py` repeats an evaluation.",
    ),
    "mlflow_run_id": Metric(
        "", "Run in MLflow.", "Not `null` if MLflow is on.", "Start the run again by its name: it backfills MLflow."
    ),
    "mlflow_experiment_id": Metric("", "Experiment in MLflow."),
}
"""Values in `summary.json`, and in MLflow as `summary/...`."""

TRAINER_METRICS: dict[str, Metric] = {
    "hvp_ray_steps_total": _counter(
        "steps",
        "Optimizer steps done by this process.",
        "`rate(...[5m])` above 0.",
        "0 for minutes: check `ready_batches`, then the trainers' log.",
    ),
    "hvp_ray_images_total": _counter("images", "Images that this rank trained on.", "Equal on all ranks."),
    "hvp_ray_progress_fraction": Metric(
        "fraction",
        "Steps done / all steps of the run.",
        "Grows.",
        "Falls: trainers restarted from a checkpoint.",
    ),
    "hvp_ray_loss": Metric("", "`train/loss` at the last record; rank 0."),
    "hvp_ray_images_per_second": Metric(
        "images/s", "`perf/images_per_second` at the last record; rank 0.", "Steady.", "See `perf/images_per_second`."
    ),
    "hvp_ray_wait_seconds_total": _counter(
        "s",
        "Time that the trainer waited for views, without the first batch.",
        "`rate(...[1m])` below 0.02.",
        "More view workers, if `ready_batches` is 0 too.",
    ),
    "hvp_ray_wait_fraction": Metric(
        "fraction", "Share of the time since the first batch that the trainer waited.", "Below 0.02."
    ),
    "hvp_ray_first_batch_seconds": Metric(
        "s", "Time from the first request to the first batch.", "Seconds.", "See `first_batch_seconds`."
    ),
    "hvp_ray_ready_batches": Metric(
        "batches",
        "Batches ready for the trainer.",
        "1 to `cluster.batches_in_flight`.",
        "Always 0: rendering is the bottleneck. More view workers.",
    ),
    "hvp_ray_under_way_batches": Metric(
        "batches",
        "Batches requested and not yet received.",
        "0 to `cluster.batches_in_flight`.",
        "At the limit with 0 ready: more view workers.",
    ),
    "hvp_ray_batches_total": _counter(
        "batches", "Batches given to the trainer.", "As `steps_total`, at most one more."
    ),
    "hvp_ray_views_total": _counter("views", "Views received.", "`rate` is images/s x views per image."),
    "hvp_ray_view_bytes_total": _counter(
        "bytes",
        "Pixels that view workers sent: views, or decoded images.",
        "`rate` below the link of the trainer's node.",
        "At the link's limit: `cluster.ship=pixels`, or view workers on the trainers' nodes.",
    ),
    "hvp_ray_repeated_batches_total": _counter(
        "batches",
        "Batches retried, because a worker died or was late.",
        "0, or a few per lost node.",
        "See `num_batches_repeated`.",
    ),
    "hvp_ray_worker_deaths_total": _counter(
        "calls",
        "Calls that ended with a dead or unreachable worker, view finishers included.",
        "0, or a few per lost node.",
        "Grows all the time: memory of the view nodes.",
    ),
    "hvp_ray_isolated_batches_total": _counter(
        "batches",
        "Batches searched image by image for one that crashes the decoder.",
        "0.",
        "The trainers' log names the images. Remove them.",
    ),
    "hvp_ray_up_workers": Metric(
        "workers",
        "View workers that answer this rank.",
        "All of the pool.",
        "Lower for minutes: a node is down and no other has room.",
    ),
    "hvp_ray_unreadable_images_total": _counter(
        "images", "Images of this rank that were replaced.", "0.", "See `num_unreadable_images`."
    ),
    "hvp_ray_checkpoints_total": _counter("checkpoints", "Checkpoints written by this process; rank 0.", "Grows."),
    "hvp_ray_checkpoint_seconds": Metric(
        "s",
        "Time that training paused for a checkpoint; rank 0. `_sum` is Ray's estimate from the buckets.",
        "A few percent of the time between two checkpoints.",
        "Slow storage: raise `training.checkpoint_every_steps`.",
        kind="histogram",
    ),
    "hvp_ray_last_checkpoint_timestamp_seconds": Metric(
        "Unix time",
        "Time of the last checkpoint; rank 0.",
        "`time() - ...` is what a crash would cost now.",
        "Lower `training.checkpoint_every_steps`.",
    ),
    "hvp_ray_spilled_bytes": Metric(
        "bytes", "Bytes that the object stores spilled since the run started; rank 0.", "0.", "See `spilled_bytes`."
    ),
    "hvp_ray_worker_restarts": Metric(
        "restarts", "Restarts of view workers since the run started; rank 0.", "0.", "See `num_worker_restarts`."
    ),
    "hvp_ray_mlflow_backlog_records": Metric(
        "records",
        "Journal records that MLflow has not accepted yet; rank 0.",
        "Below 100.",
        "Grows: MLflow is slow or unreachable. Nothing is lost and training does not wait.",
    ),
    "hvp_ray_mlflow_outage": Metric(
        "0 or 1",
        "1 while MLflow is unreachable or refuses records; rank 0.",
        "0.",
        "The trainers' log has the reason. The backfill is automatic.",
    ),
}
"""Published by every trainer; labels `run` and `rank`."""

WORKER_METRICS: dict[str, Metric] = {
    "hvp_ray_worker_batches_total": _counter(
        "batches",
        "Batches rendered. With `cluster.ship=pixels`: decoded by a view worker, or rendered by a view finisher.",
        "Grows alike on every worker.",
        "Stands still on one: read its log.",
    ),
    "hvp_ray_worker_views_total": _counter("views", "Views rendered. 0 if it only decodes.", "Grows alike."),
    "hvp_ray_worker_render_seconds_total": _counter(
        "s",
        "Time spent reading, decoding and rendering.",
        "`rate` from 0.3 to 0.9.",
        "At 1 on all workers: more workers. Near 0: fewer workers would do.",
    ),
    "hvp_ray_worker_render_cpu_seconds_total": _counter(
        "s",
        "CPU time spent reading, decoding and rendering.",
        "Near `worker_render_seconds_total`.",
        "Far below: it waits for storage, or shares its CPU.",
    ),
    "hvp_ray_worker_views_per_second": Metric(
        "views/s", "Speed of its last batch.", "Alike on like nodes.", "One is slow: an overloaded node."
    ),
    "hvp_ray_worker_unreadable_images_total": _counter(
        "images", "Images that it could not decode and replaced.", "0.", "See `num_unreadable_images`."
    ),
}
"""Published by every view worker and view finisher; labels `run` and `worker`."""
