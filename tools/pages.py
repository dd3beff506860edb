"""Pages from templates beside the code that fills them: HTML is escaped, a name that is not filled in is an error."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

if TYPE_CHECKING:
    from PIL.Image import Image


def render_page(path: Path, filters: dict[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A template, filled in. It may include what lies beside it and, for HTML, head.html and page.css of run_report."""
    jinja = Environment(
        loader=FileSystemLoader([path.parent, Path(__file__).parent / "run_report"]),
        autoescape=path.suffix == ".html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= filters or {}
    return jinja.get_template(path.name).render(values)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def data_uri(picture: "Image", quality: int) -> str:
    """A picture as a JPEG within a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
