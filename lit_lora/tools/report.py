"""``lit-lora report``: a page about a run."""

from __future__ import annotations

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def report(run: str, out: str | None = None) -> None:
    """Write one HTML file about a run: losses, ranks, memory, samples over time, settings, and how to use the adapter.

    The file needs no other file, no network and no script.

    Args:
        run: Folder of the run, of lit-lora train or of one version of fit, such as runs/sd15/lightning_logs/version_0; of several
            versions the newest is shown, with the curves and samples of those that it was resumed from.
        out: File to write, with the ending .html, or an existing folder for report.html. Defaults to report.html in the folder of
            the version.
    """
    from pathlib import Path

    from lit_lora.tools.run_page.write import write_page

    target = None if out is None else Path(out)
    print(f"report: {write_page(Path(run), target)}")
