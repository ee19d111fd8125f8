"""HTML pages without links to other files: the style, the parts, and PNG files as data. Used for runs and comparisons."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2


def render_page(package: str, template: str, captions: Mapping[str, str], **values: Any) -> str:
    """Return an HTML page.

    Args:
        package: package that has the template. It extends `page.html.jinja` and may import `parts.html.jinja`.
        template: name of the template.
        captions: file name of a figure -> its caption. A figure that is not named gets its name.
        values: variables of the template.
    """
    loaders = [jinja2.PackageLoader(name, package_path="") for name in (package, __package__)]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "base64": _base64,
        "caption": lambda path: captions.get(path.name, path.stem.replace("_", " ")),
        "percent": lambda value: f"{100 * value:.2f}",
    }
    return environment.get_template(template).render(**values)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
