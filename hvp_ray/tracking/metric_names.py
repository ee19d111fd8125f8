"""Names of the recorded values, what they mean, and what to do about them. A slash makes a section in MLflow."""

METRICS: dict[str, str] = {
    "train/loss": "Training loss on the chosen pairs, mean over all trainers. Lower is better; HVP's is higher than "
    "that of random views, because its pairs are harder.",
    "train/learning_rate": "Learning rate of the scheduled parameters.",
    "train/gradient_norm": "Global norm of the gradient before clipping; recorded where clipping is on.",
    "train/epoch": "Epochs done, as a fraction.",
    "train/class_loss": "iBOT: the class tokens' part of the loss.",
    "train/patch_loss": "iBOT: the masked patches' part of the loss.",
    "selection/chosen_score": "Loss of the chosen candidate in the scoring pass, mean over images.",
    "selection/other_score": "Mean loss of all candidates that were not chosen.",
    "selection/mean_score": "Mean loss of all candidates, where the rule scores without choosing by it.",
    "selection/chosen_iou": "Overlap (IoU) of the chosen pair's crops, mean over images.",
    "selection/other_iou": "Mean overlap of the pairs that were not chosen. HVP chooses pairs of smaller overlap.",
    "selection/min_iou_share": "Share of images whose chosen pair is also the one of least overlap; chance is 1 / P.",
    "selection/chosen_color_distance": "Distance of the chosen pair's colour factors (brightness, contrast, saturation, "
    "hue; without jitter: 0).",
    "selection/other_color_distance": "The same for the pairs that were not chosen.",
    "selection/unmasked_share": "iBOT: share of the chosen global views that have no mask. Hard views prefer masked ones, "
    "which raises the masking rate; method.scoring=class does not look at masks.",
    "selection/unmasked_share_offered": "The same share among all candidates.",
    "collapse/embedding_std": "Standard deviation of the normalised embeddings x sqrt(D): about 1 is healthy, near 0 is "
    "collapse.",
    "collapse/effective_rank": "exp of the entropy of the embeddings' singular values: how many dimensions are in use.",
    "collapse/teacher_entropy": "DINO, iBOT: mean entropy of the teacher's output, nats; log(prototypes) is uniform, 0 is "
    "one prototype.",
    "collapse/teacher_information": "DINO, iBOT: entropy of the mean output minus that mean, nats: what the output says "
    "about the image. Near 0 is collapse, to the uniform output or to one prototype.",
    "eval/knn_top1": "k-NN accuracy of the frozen encoder on test images, all labels (cosine, temperature 0.07).",
    "eval/knn5shot_top1": "The same with 5 labelled images per class, mean over 20 fixed draws.",
    "perf/images_per_second": "Images trained on per second, over the last recorded interval.",
    "perf/step_seconds": "Wall time of a step.",
    "perf/wait_seconds": "Time a step stood still for its batch. Above a few percent of the step: more view workers.",
    "stream/views_per_second_per_worker": "Speed of a view worker while it renders, mean over workers.",
    "stream/bytes": "Bytes of pixels that view workers sent so far.",
    "stream/retries": "Batches asked again so far, because a worker died or was late.",
}
