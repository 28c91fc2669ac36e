"""The page *The papers, reproduced*, written from the results alone."""

from pathlib import Path

import pandas as pd

from flows.report import experiments
from flows.report.experiments import Experiment, Table
from merging.io import atomic

PAPERS = {
    "gradient_matching": "Gradient matching (Daheim et al. 2024)",
    "regmean": "RegMean (Jin et al. 2023)",
    "quality_diversity": "Quality and diversity",
    "mats": "MaTS (Tam et al. 2024)",
}
HEAD = """# The papers, reproduced

Written by `python -m benchmarks.papers` from its results, never by hand. Every experiment runs on models and data that come
through package registries (`make papers`): *sentiment*, MiniLM on four domains, each with a head of its own; *continued*, the
same from a base that learnt movie reviews first, whose head all share; *parts*, eight non-iid members of these domains
as one set; *pairs*, inference, definition, usage and sense from WordNet; *tagging*, parts of speech in four genres; *images*,
a ViT-S on digits, clothes, things and signs. They are smaller than the papers' pools: a claim that fails here may hold there.
`mergequest report --experiment benchmarks/papers/results` makes one page, figures, CSV and LaTeX of the same results.

Scores are of test, × 100. Differences are paired over the same examples, ± one standard error. Beyond twice of it they *agree*
with the paper or *contradict* it; within it there is *no difference* that so many examples show. One comparison in twenty is
beyond it by chance. A *seed* is that of the members' training: order of examples, heads, and the parts' shares; test examples
are the same. *Control* and *Ours* begin what no paper says: a look at why something came out so.
"""
FIGURES = "papers"
"""Directory of the figures beside the page."""


def write_page(results: Path, docs: Path) -> None:
    """Writes docs/papers.md, and figures and tables in docs/papers, from all results of a directory."""
    frame = experiments.load([str(results)])
    experiments.write_files(frame, str(docs / FIGURES))
    atomic.write_text(str(docs / "papers.md"), page(frame))


def page(frame: pd.DataFrame) -> str:
    """The page of all results."""
    lines = [HEAD]
    if claims := experiments.claims(frame):
        bold = [[f"**{cell}**" if cell == "contradicts" else cell for cell in row] for row in claims.rows]
        lines += [f"## All claims\n\n{experiments.counted(frame)}.\n", Table(bold, words=True).as_markdown(), ""]
    every = experiments.experiments(frame)
    for paper, title in PAPERS.items():
        own = [one for one in every if one.name.startswith(f"{paper}.")]
        lines += [f"## {title}", ""] if own else []
        for name in dict.fromkeys(one.name for one in own):
            lines += _experiment([one for one in own if one.name == name])
    return "\n".join(lines).rstrip() + "\n"


def _experiment(results: list[Experiment]) -> list[str]:
    lines = [f"### `{results[0].name}`", "", results[0].about, ""]
    for one in results:
        lines += [f"*{one.pool}*, {one.extent}.", ""]
        lines += [one.note, ""] if one.note else []
        lines += [f"![{one.name} on {one.pool}]({FIGURES}/{one.key}.svg)", ""] if one.picture() else []
        for table in one.tables():
            lines += [table.as_markdown(), ""]
    return lines
