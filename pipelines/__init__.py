"""The subcommands of `hvp-ray` as files, for `ray job submit -- python pipelines/pretrain.py` and for a checkout."""
