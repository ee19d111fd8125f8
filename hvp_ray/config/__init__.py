"""A run as a typed, frozen value: what recipes build, what the command line overrides, what is logged.

`run_config.py` has the whole config, and every section has a file. The types of the fields hold their ranges, which are
checked on construction (`checks.py`). `None` means off, and the field says so. Nothing that is computed at run time is
stored here. `hvp_ray/identity.py` says which fields may change a bit of the result.
"""

from hvp_ray.config.checks import (
    AtLeast0,
    AtLeast1,
    Checked,
    Fraction,
    Limits,
    NonNegative,
    Positive,
    Range,
    conditions_left_out,
    deferred_checks,
    require,
)
from hvp_ray.config.cluster import ClusterConfig, RendererName
from hvp_ray.config.data import DataConfig
from hvp_ray.config.method import BackboneConfig, MethodConfig
from hvp_ray.config.optimizer import OptimizerConfig
from hvp_ray.config.run import RunSettings
from hvp_ray.config.run_config import RunConfig
from hvp_ray.config.selection import Rule, SelectionConfig, Weighting
from hvp_ray.config.serialising import METHOD_TYPE, config_from_dict, config_to_dict, flatten, with_settings
from hvp_ray.config.tracking import Logger, TrackingConfig
from hvp_ray.config.training import TrainingConfig
from hvp_ray.config.views import MaskConfig, TransformConfig, ViewGroupConfig, ViewsConfig

__all__ = [
    "METHOD_TYPE",
    "AtLeast0",
    "AtLeast1",
    "BackboneConfig",
    "Checked",
    "ClusterConfig",
    "DataConfig",
    "Fraction",
    "Limits",
    "Logger",
    "MaskConfig",
    "MethodConfig",
    "NonNegative",
    "OptimizerConfig",
    "Positive",
    "Range",
    "RendererName",
    "Rule",
    "RunConfig",
    "RunSettings",
    "SelectionConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TransformConfig",
    "ViewGroupConfig",
    "ViewsConfig",
    "Weighting",
    "conditions_left_out",
    "config_from_dict",
    "config_to_dict",
    "deferred_checks",
    "flatten",
    "require",
    "with_settings",
]
