"""``dpo report``: a page of numbers and pictures about a training run."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from ..durable import replace_file
from ..errors import UserError, write_fault
from ..run_folder import REPORT_PAGE

__all__ = ["write_report"]


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
    from .page import SavedPicture, render
    from .records import read_run
    from .style import DPI

    run = read_run(Path(run_dir))
    page = run.folder / REPORT_PAGE
    folder = page.parent
    try:
        folder.mkdir(exist_ok=True)
        saved = []
        for picture in PICTURES:
            path = folder / f"{picture.name}.png"
            figure = picture.draw(run)
            if figure is None:
                # A picture of an earlier, longer run must not stay beside this one's.
                path.unlink(missing_ok=True)
                continue
            image = io.BytesIO()
            figure.savefig(image, dpi=DPI)
            replace_file(path, image.getbuffer())
            width, height = figure.canvas.get_width_height()
            data = base64.b64encode(image.getbuffer()).decode("ascii")
            saved.append(SavedPicture(data, picture.words(run), width, height))
        replace_file(page, render(run, saved).encode("utf-8"))
    except OSError as error:
        found = write_fault(error)
        advice = found.remedy("move the run elsewhere")
        raise UserError(f"cannot write the report to {folder}: {found.what}; {advice}") from error
    return page
