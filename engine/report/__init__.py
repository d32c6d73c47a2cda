"""``dpo report``: a page of numbers and pictures about a training run, or about several."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..durable import replace_file
from ..errors import UserError, write_fault
from ..run_folder import REPORT_PAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .page import SavedPicture

__all__ = ["default_path", "write_comparison", "write_report"]


def default_path(folders: Sequence[Path]) -> Path:
    """Where the comparison of some runs is written: beside the first of them."""
    return folders[0].resolve().parent / "comparison.html"


def write_report(run_dir: Path) -> Path:
    """Write ``report/index.html`` into a run folder, over an earlier report of the same run.

    The page holds its pictures, so that it can be sent on; they are beside it as PNGs, too.

    Reads ``metrics.jsonl`` and, where present, ``config.yaml``, ``data.json`` and ``evaluation.json``; the run may
    still be going.

    Args:
        run_dir: The ``train.output_dir`` of a run.

    Returns:
        The path of the page.

    Raises:
        UserError: The folder is no run folder, a file in it is damaged, or the report cannot be written.
    """
    from .figures import PICTURES
    from .page import render
    from .records import read_run

    run = read_run(Path(run_dir))
    page = run.folder / REPORT_PAGE
    folder = page.parent
    with _written_to(folder):
        folder.mkdir(exist_ok=True)
        saved = []
        for picture in PICTURES:
            path = folder / f"{picture.name}.png"
            figure = picture.draw(run)
            if figure is None:
                # A picture of an earlier, longer run must not stay beside this one's.
                path.unlink(missing_ok=True)
                continue
            image = _image(figure)
            replace_file(path, image)
            saved.append(_saved(figure, image, picture.words(run)))
        replace_file(page, render(run, saved).encode("utf-8"))
    return page


def write_comparison(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page about several runs, which may still be going.

    Args:
        run_dirs: The ``train.output_dir`` of each.
        output: The page; by default ``comparison.html`` beside the first run.

    Returns:
        The path of the page.

    Raises:
        UserError: As of ``write_report``, or a folder is named twice.
    """
    from .compare import names_of, pictures, render
    from .records import read_run

    folders = [Path(folder) for folder in run_dirs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run is named twice: give the folders of different runs")
    runs = [read_run(folder) for folder in folders]
    names = names_of(runs)
    page = default_path(folders) if output is None else output
    with _written_to(page.parent):
        page.parent.mkdir(parents=True, exist_ok=True)
        saved = [_saved(figure, _image(figure), caption) for caption, figure in pictures(runs, names)]
        replace_file(page, render(runs, names, saved).encode("utf-8"))
    return page


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = write_fault(error)
        advice = found.remedy("move the run elsewhere")
        raise UserError(f"cannot write the report to {folder}: {found.what}; {advice}") from error


def _image(figure: Figure) -> bytes:
    from .style import DPI

    image = io.BytesIO()
    figure.savefig(image, dpi=DPI)
    return image.getvalue()


def _saved(figure: Figure, image: bytes, caption: str) -> SavedPicture:
    from .page import SavedPicture

    width, height = figure.canvas.get_width_height()
    return SavedPicture(base64.b64encode(image).decode("ascii"), caption, width, height)
