"""The page itself: templates of this package filled with what was found. Everything in them is escaped."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import jinja2
from markupsafe import Markup

from hpseg.reporting import curves

MAX_BYTES = 10_000_000  # of a page: what mail takes
PICTURE_BYTES = 8_000_000  # of all pictures in it


def render(content: dict[str, Any]) -> str:
    """The page as HTML. content: what `templates/report.html` names.

    A policy in the page keeps a browser from loading anything and from running any script but the page's own.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpseg.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "share": share}
    style, script = (Markup(environment.get_template(name).render()) for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    chart = {"width": curves.WIDTH, "height": curves.HEIGHT, "left": curves.LEFT, "right": curves.RIGHT}
    chart |= {"top": curves.TOP, "bottom": curves.BOTTOM}
    return environment.get_template("report.html").render(
        **content, style=style, script=script, script_hash=f"sha256-{digest}", frame=chart
    )


def percent(value: float | None) -> str:
    """A score in percent, without the sign."""
    return "-" if value is None else f"{value:.1f}"


def share(value: float) -> str:
    """A part of 1 in percent, with the sign."""
    if 0 < value < 0.001:
        return "< 0.1 %"
    return f"{100 * value:.0f} %" if value >= 0.0995 else f"{100 * value:.1f} %"
