"""The errors of hvp_ray. Every message states what happened, what was expected and what to do next."""


class HvpRayError(Exception):
    """Base of all errors that hvp_ray raises on purpose."""


class ConfigError(HvpRayError, ValueError):
    """A setting is wrong: the message has its path, its value and what is allowed."""


class DataError(HvpRayError):
    """A data source, or an image in it, cannot be used."""


class ChangedDataError(DataError):
    """The images of a source changed since the run was started, so ids would name other images."""


class LabelError(DataError):
    """A source has no usable labels. Its images can still be trained on."""


class UnreadableImageError(DataError):
    """The bytes of one image cannot be turned into pixels; the stream replaces such an image."""


class ShapeError(HvpRayError, ValueError):
    """An array or tensor does not fit: name, found, expected."""


class StageError(HvpRayError):
    """A stage of the pipeline failed more often than its budget allows."""


class CheckpointError(HvpRayError):
    """A checkpoint is missing, incomplete, damaged, or belongs to a run of another identity."""


class LostRunError(HvpRayError):
    """Another process has taken the run over, so this one must not train it any more."""

    same_job: bool = False
    """Whether the other process is a later attempt of the same job, which goes on."""


class TrainingError(HvpRayError):
    """Training cannot continue, for instance because the loss is not finite."""


class RowReuseError(HvpRayError):
    """Rows cannot be reused: the module mixes rows, or what was kept is not valid any more."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, at most 500 characters, or its type if it has no text."""
    return (str(error) or type(error).__name__).splitlines()[0][:500]
