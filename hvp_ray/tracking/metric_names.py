"""Names and meanings of the recorded metrics. A slash makes a section in MLflow."""

METRICS: dict[str, str] = {
    "train/loss": "Training loss on the chosen pairs, mean over all trainers. Lower is better. HVP's loss is higher than "
    "that of random views, because its pairs are harder.",
    "train/learning_rate": "Learning rate of the scheduled parameters.",
    "train/gradient_norm": "Global norm of the gradient before clipping; recorded if clipping is on.",
    "train/epoch": "Epochs done, as a fraction.",
    "train/class_loss": "iBOT: the part of the loss on class tokens.",
    "train/patch_loss": "iBOT: the part of the loss on masked patches.",
    "selection/chosen_score": "Loss of the chosen candidate in the scoring pass, mean over images.",
    "selection/other_score": "Mean loss of all candidates that were not chosen.",
    "selection/mean_score": "Mean loss of all candidates, if the step scores but its rule does not read the scores.",
    "selection/chosen_iou": "Overlap (IoU) of the chosen pair's crops, mean over images.",
    "selection/other_iou": "Mean overlap of the pairs that were not chosen. HVP chooses pairs of smaller overlap.",
    "selection/min_iou_share": "Fraction of images whose chosen pair also overlaps least; chance is 1 / P.",
    "selection/chosen_color_distance": "Distance between the colour factors (brightness, contrast, saturation, hue) of the "
    "chosen pair's views. A view without jitter has neutral factors.",
    "selection/other_color_distance": "Mean colour distance of the pairs that were not chosen.",
    "selection/unmasked_share": "iBOT: fraction of the chosen global views without a mask. Hard views prefer masked ones, "
    "which raises the masking rate. method.scoring=class ignores masks.",
    "selection/unmasked_share_offered": "iBOT: fraction of all candidate views without a mask.",
    "collapse/embedding_std": "Standard deviation of the normalised embeddings x sqrt(D): about 1 is healthy, near 0 is "
    "collapse.",
    "collapse/effective_rank": "exp of the entropy of the embeddings' singular values: the number of dimensions in use.",
    "collapse/teacher_entropy": "DINO, iBOT: mean entropy of the teacher's output, nats; log(prototypes) is uniform, 0 is "
    "one prototype.",
    "collapse/teacher_information": "DINO, iBOT: entropy of the mean output minus the mean entropy, nats: the information of "
    "the output about the image. Near 0 is collapse, to the uniform output or to one prototype.",
    "eval/knn_top1": "k-NN accuracy of the frozen encoder on test images, all labels (cosine, temperature 0.07).",
    "eval/knn5shot_top1": "k-NN accuracy with 5 labelled images per class, mean over 20 fixed draws.",
    "perf/images_per_second": "Images trained on per second, over the last recorded interval.",
    "perf/step_seconds": "Wall time of a step.",
    "perf/wait_seconds": "Time that a step waits for its batch. Above a few percent of the step, add view workers.",
    "stream/views_per_second_per_worker": "Rendering speed of a view worker, mean over workers.",
    "stream/bytes": "Bytes of pixels sent by view workers so far.",
    "stream/retries": "Batches requested again so far, because a worker died or was late.",
}
