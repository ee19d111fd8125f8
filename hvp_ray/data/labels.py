"""Labels of training and test images in one numbering, matched by the names of the classes.

Every source numbers its classes itself: a folder by its sorted names, a `ClassLabel` by its list. A label is therefore valid
in its own source only. Every evaluation takes its labels from this module.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvp_ray.data.dataset import Dataset, have_same_images
from hvp_ray.data.source import UNLABELLED, Source, renumber
from hvp_ray.errors import DataError, LabelError, first_line

_SHOWN = 5
_WHAT_TO_DO = (
    "Give both sides names (class folders, a column of strings, a ClassLabel in Parquet) or the same numbers. To train "
    "without evaluation, set --tracking.knn_images 0"
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MatchedLabels:
    """Labels of a data set, in the numbering of its training source."""

    training_ids: NDArray[np.int64]
    """[N], ascending: labelled images among `Dataset.training_ids`."""
    test_ids: NDArray[np.int64]
    """[M], ascending: labelled images among `Dataset.test_ids`, of classes that the training source has."""
    of_training: NDArray[np.int64]
    """Labels of all images of `Dataset.source`; `UNLABELLED` for an image without one."""
    of_test: NDArray[np.int64]
    """Labels of all images of `Dataset.test_source`; `UNLABELLED` also for classes that the training source lacks."""
    remarks: tuple[str, ...]
    """Sentences for the user."""


def match_labels(dataset: Dataset) -> MatchedLabels:
    """Match the classes of training and test images by name, or by number if neither side has names.

    Test images of a class that the training source lacks are left out, with a remark. No classifier can name their
    class, so they do not measure the encoder.

    Raises:
        LabelError: there is nothing to evaluate on; the message has the reason.
        DataError: both sides have labels that cannot be matched, test images are training images too, or they cannot
            be read.
    """
    source, test_source = dataset.source, dataset.test_source
    of_training = of_test = source.load_labels()
    remarks: tuple[str, ...] = ()
    if test_source is not source:
        _check_other_images(source, test_source)
        of_test, remarks = _match(source, test_source)
    elif len(dataset.test_ids) and (repeated := source.num_repeated_images()):
        raise DataError(
            f"{repeated:,} images of data.source name a file that is named before, so held-out test images may be training "
            f"images too: the nearest neighbour of each would be itself. Name each file once, or name test images by "
            f"data.test_source. To train without evaluation, set --tracking.knn_images 0"
        )
    training_ids = dataset.training_ids[of_training[dataset.training_ids] != UNLABELLED]
    test_ids = dataset.test_ids[of_test[dataset.test_ids] != UNLABELLED]
    is_new = ~np.isin(of_test[test_ids], of_training[training_ids])
    if len(training_ids) and is_new.any():
        classes = [_name(source.load_class_names(), label) for label in np.unique(of_test[test_ids[is_new]]).tolist()]
        remarks += (_describe_left_out(int(is_new.sum()), len(test_ids), classes),)
        of_test = of_test.copy()
        of_test[test_ids[is_new]] = UNLABELLED
        test_ids = test_ids[~is_new]
    if not len(dataset.test_ids):
        raise LabelError(
            "there are no test images; name some by data.test_source, or hold some out by data.test_fraction"
        )
    for what, labelled, ids, labels in (
        ("training", training_ids, dataset.training_ids, of_training),
        ("test", test_ids, dataset.test_ids, test_source.load_labels()),
    ):
        if not len(labelled):
            shared = " of a class of the training images" if what == "test" and len(training_ids) else ""
            raise LabelError(f"none of the {len(ids)} {what} images has a label{shared}")
        unlabelled = int((labels[ids] == UNLABELLED).sum())
        if unlabelled:
            remarks += (f"{unlabelled:,} of {len(ids):,} {what} images have no label, and are left out of evaluations",)
    return MatchedLabels(
        training_ids=training_ids, test_ids=test_ids, of_training=of_training, of_test=of_test, remarks=remarks
    )


def _check_other_images(source: Source, test_source: Source) -> None:
    try:
        are_same = have_same_images(source, test_source)
        share_files = not are_same and source.shares_files_with(test_source)
    except OSError as error:
        raise DataError(f"training and test images cannot be compared: {first_line(error)}") from error
    if are_same:
        raise DataError(
            "training and test images are the same images: the nearest neighbour of each would be itself. Name other test "
            "images, or leave data.test_source out to hold out data.test_fraction of them. To train without evaluation, "
            "set --tracking.knn_images 0"
        )
    if share_files:
        raise DataError(
            "some test images are also training images, because data.source and data.test_source name the same files: "
            "the nearest neighbour of each would be itself. Move the test images out of data.source, or leave "
            "data.test_source out to hold out data.test_fraction. To train without evaluation, set --tracking.knn_images 0"
        )


def _match(source: Source, test_source: Source) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the test labels in the numbering of the training source, and remarks on what was left out."""
    training, test = source.load_labels(), test_source.load_labels()
    names, test_names = source.load_class_names(), test_source.load_class_names()
    labelled = test != UNLABELLED
    if bool(names) != bool(test_names):
        sides = [_describe(names, training), _describe(test_names, test)]
        raise DataError(
            f"the classes of training and test images cannot be matched: training has {sides[0]}, test has {sides[1]}. "
            f"{_WHAT_TO_DO}"
        )
    if names == test_names:  # or neither has names, so the numbers must agree
        matched = np.where(np.isin(test, training), test, UNLABELLED) if not names else test
    else:
        index = _index(names, "training")
        _index(test_names, "test")
        matched = renumber(test, (index.get(_normal(name), UNLABELLED) for name in test_names))
    left_out = labelled & (matched == UNLABELLED)
    if labelled.any() and left_out.sum() == labelled.sum():
        raise DataError(
            f"no class of the test images is one of the training images: training has {_describe(names, training)}, test has "
            f"{_describe(test_names, test)}. {_WHAT_TO_DO}"
        )
    if not left_out.any():
        return matched, ()
    classes = np.unique(test[left_out]).tolist()
    names_left_out = [_name(test_names, label) for label in classes]
    return matched, (_describe_left_out(int(left_out.sum()), int(labelled.sum()), names_left_out),)


def _describe_left_out(count: int, num_labelled: int, classes: Sequence[str]) -> str:
    return (
        f"{count:,} of {num_labelled:,} labelled test images are of {len(classes)} class(es) that the training "
        f"images do not have, and are left out of evaluations: {_list(classes)}"
    )


def _index(names: Sequence[str], side: str) -> dict[str, int]:
    """Return name -> label.

    Raises:
        DataError: two classes have one name.
    """
    index = {_normal(name): label for label, name in enumerate(names)}
    if len(index) < len(names):
        twice = next(name for label, name in enumerate(names) if index[_normal(name)] != label)
        raise DataError(
            f"the classes of training and test images cannot be matched: two classes of the {side} images have the name "
            f"{twice!r}; give each class a name of its own"
        )
    return index


def _normal(name: str) -> str:
    # macOS decomposes accents in folder names.
    return unicodedata.normalize("NFC", name)


def _name(names: Sequence[str], label: int) -> str:
    return repr(names[label]) if names else str(label)


def _describe(names: Sequence[str], labels: NDArray[np.int64]) -> str:
    if names:
        return f"the names {_list([repr(name) for name in names])}"
    numbers = np.unique(labels[labels != UNLABELLED]).tolist()
    return f"the numbers {_list([str(number) for number in numbers])} without names"


def _list(entries: Sequence[str]) -> str:
    return ", ".join(entries[:_SHOWN]) + (f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else "")
