"""Report pages from Jinja2 templates: one style, nothing fetched, no script, every text escaped where it is inserted.

`base.html.j2`, `parts.html.j2` and `style.css` in this folder are shared by all pages. Names come from checkpoints,
which are untrusted: each text has its control characters escaped, then HTML is escaped.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsv4.text import printable

_SHARED = Path(__file__).parent


def _safe(value: Any) -> Any:
    """Texts without control characters. Markup was made by our templates."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render_page(name: str, folder: Path = _SHARED, **values: Any) -> str:
    """The page of the template `name` in `folder`, which may use the shared parts."""
    environment = Environment(
        loader=FileSystemLoader([folder, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(**values)
