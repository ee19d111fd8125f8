"""A node whose environment is broken: processes that have this folder on their PYTHONPATH cannot import simplejpeg."""

raise ImportError("simplejpeg is not installed on this node")
