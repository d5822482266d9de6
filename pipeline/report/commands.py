"""`scripts/report.py`: what finished runs found, in the terminal; as files where a folder for them is given."""

from __future__ import annotations

from pathlib import Path

from pipeline.analysis.values import StudyFigures, Verdict
from pipeline.analysis.verdict import verdict
from pipeline.config.commands import ReportConfig
from pipeline.core.files import check_writable, write_atomically
from pipeline.core.progress import log, start_logging
from pipeline.page.page import write_page
from pipeline.report import tables
from pipeline.report.keep import keep_runs
from pipeline.report.study_figures import Study, read_study
from pipeline.report.text import markdown, terminal


def run(config: ReportConfig) -> StudyFigures:
    """Print the verdict, the tables and the conclusions; write the page and the tables too where `out` is given."""
    start_logging()
    for name, folder in (("out", config.out), ("keep", config.keep)):
        if folder is not None:
            check_writable(Path(folder), name)
    study = read_study(config.runs, name=config.study, command=config.command)
    judged = verdict(study.figures)
    for line in terminal(study.figures, judged):
        print(line)
    if config.out is not None:
        written = write_files(study, judged, Path(config.out))
        log.info("wrote %s and beside it %s", written[0], ", ".join(path.name for path in written[1:]))
    if config.keep is not None:
        keep_runs(study.arms, study.texts, Path(config.keep))
    return study.figures


def write_files(study: Study, judged: Verdict, out: Path) -> list[Path]:
    """The page, report.md and the tidy tables; the paths that were written, without the page's figures."""
    page, report = write_page(study.figures, judged, out)[0], out / "report.md"
    write_atomically(report, markdown(study.figures, judged))
    found = {
        "runs": tables.runs_table(study.arms, study.texts),
        "arms": tables.arms_table(study.figures),
        "predictions": tables.predictions_table(study.arms, study.texts),
        "curves": tables.curves_table(study.figures.training),
    }
    for name, table in found.items():
        table.write_parquet(out / f"{name}.parquet")
    return [page, report, *(out / f"{name}.parquet" for name in found)]
