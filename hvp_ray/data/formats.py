"""The formats of sources, in the order in which they are tried.

A format is one file with a class that implements `Source`, a function that recognises it, and a line here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hvp_ray.data.digits import open_digits
from hvp_ray.data.folder import open_folder
from hvp_ray.data.hugging_face import MARKS, open_hugging_face
from hvp_ray.data.image_list import LIST_SUFFIXES, open_image_list
from hvp_ray.data.parquet import PARQUET_SUFFIXES, open_parquet
from hvp_ray.data.shards import open_shards
from hvp_ray.data.source import Place, Source
from hvp_ray.data.web_dataset import TAR_SUFFIXES, open_web_dataset


@dataclass(frozen=True, slots=True)
class Format:
    """A format of sources."""

    recognise: Callable[[Place], Source | None]
    """Opens the source; None: it is of another format. Raises DataError if it is of this one and cannot be used."""
    endings: tuple[str, ...] = ()
    """Endings of the names (in lower case) of the files by which it is recognised. They are listed in a folder."""


FORMATS = (
    Format(open_digits),
    Format(open_shards),
    Format(open_hugging_face, MARKS),
    Format(open_parquet, PARQUET_SUFFIXES),
    Format(open_image_list, LIST_SUFFIXES),
    Format(open_web_dataset, TAR_SUFFIXES),
    Format(open_folder),
)

FILE_ENDINGS = tuple(ending for entry in FORMATS for ending in entry.endings)
