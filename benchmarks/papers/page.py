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
same from a base that learnt movie reviews first, whose head all share; *parts*, eight non-iid members of these domains as one
set; *pairs*, inference, definition, usage and similarity (by Pearson) from WordNet; *topics*, what sentences of four
genres are about, several topics at once, one head; *topic-parts*, six non-iid members of these genres as one set; *tagging*,
parts of speech in four genres; *images*, a ViT-S on digits, clothes, things and signs; *seq2seq*, a small T5 on bytes, on
pronunciation, spelling, inflection and parts of speech. They are smaller than the papers' pools: a claim that fails here may
hold there. With `--campaign FILE` an experiment runs on anyone's members and tasks.
`mergequest report --experiment benchmarks/papers/results` makes one page, figures, CSV and LaTeX of the same results.

Scores are of test, × 100. Differences are paired over the same examples, ± one standard error. Beyond twice of it they *agree*
with the paper or *contradict* it; within it there is *no difference* that so many examples show. One comparison in twenty is
beyond it by chance. A *seed* is that of the members' training: order of examples, heads, and the parts' shares; test examples
are the same. *Control* and *Ours* begin what no paper says: a look at why something came out so.
"""
READINGS = {
    ("gradient_matching.removal", "continued"): (
        "The others' loss is the pool's: all members learnt one task, and each vector holds what they share. The domain that "
        "is taken out loses 1.1 to 3 times as much as the others by task arithmetic, so removal is selective, but not free. "
        "Gradient matching with `clamp` loses more of the others than task arithmetic does, down to chance with seed 0: where "
        "H₀ + Σ α H is raised to δ, the numerator (H₀ + H) τ is not, so entries of large curvature move by many times τ. "
        "Without it such a removal is refused. A model that says the same class of everything has lost the domain, too: "
        "whether a removal is of that domain is in the controls."
    ),
    ("gradient_matching.table_1", "continued"): (
        "At α = 1 the vectors of three members add up, which goes too far on this pool; task arithmetic loses more by it. "
        "δ is not the cause: from 1e-12 to 1e-3 it moves the score by 0.3 (seed 0, first 100 test examples a domain). Nor does "
        "another α help that can be known: with seed 0 the one that validation chooses has 70.2, where the best on test has "
        "74.8, no more than the average."
    ),
    ("regmean.figure_6", "sentiment"): (
        "The paper's members share one head. Here a domain has the head that was trained above its own member's encoder; what "
        "that costs a merge more than a single member was not separated. On *continued*, whose members share one head, RegMean "
        "is above the best member."
    ),
    ("regmean.table_2", "pairs"): (
        "It is similarity, a correlation: the mean is of the tasks, and of merges this one is below 0, as the base's. Its own "
        "member alone has 70 there, and is the best member by that. On the other three tasks RegMean has 66.5, the ensemble "
        "64.3, the average 59.2, Fisher averaging 57.7, and that member 42.5, little more than chance. All heads were trained "
        "above other encoders than the merged one; nothing ties the sign of what they read."
    ),
    ("regmean.figure_3", "pairs"): (
        "Pairs of classes lose 0 to 3 % by RegMean, and those of definition or usage with similarity half and more by every "
        "method: merged, similarity's correlation falls to about 0 or below."
    ),
    ("regmean.table_2", "parts"): (
        "It is the merged head and the layer below it, the pooler, more than the encoder: with both averaged instead, as the "
        "row below has it, no difference to the plain average is left. On the first 200 test examples RegMean has 42.0, 57.0 "
        "with the head averaged, 63.0 with the pooler averaged, too, where the plain average has 65.5. Their inputs are one "
        "token an example and, in a part, mostly of one class; fitted to these, the pooler's weights move by 3.4 times their "
        "norm. More examples behind the Grams (400 for 96 a member) change little (43.5); the Grams' diagonals "
        "alone (ρ = 0) have 63.0."
    ),
    ("regmean.table_2", "topics"): (
        "Here RegMean comes out as in the paper, on unseen genres most. The control is against a guess of ours from *parts*: "
        "fitted to members that have seen every class, the pooler and the shared head are better than averaged."
    ),
    ("regmean.table_2", "topic-parts"): (
        "As on *parts*, non-iid members of one set are where Fisher averaging, the best member and the ensemble are above "
        "RegMean; it is 9 points above the plain average, though, and here it is not the head: with pooler and head averaged "
        "it loses. What makes Fisher averaging better there was not looked into."
    ),
    ("regmean.table_2", "seq2seq"): (
        "The best member has 80 on its own task and next to nothing on the others; the mean is compared. Every merge is "
        "below the base, which was trained on a little of all four tasks: each member forgot the others'."
    ),
    ("regmean.table_8", "sentiment"): (
        "The β beside ρ = 0.9 is the best of three on the same test examples, but validation chooses the same one. With ρ = 1 "
        "there is no difference either: on this pool the off-diagonal entries do no harm that is worth damping."
    ),
    ("quality_diversity.figure_1", "sentiment"): (
        "Centred representations of four members lie in three dimensions: 3.01 is all that there is, where 3.18 of 4 are told "
        "apart without centring. On *parts*, whose members are alike, centring tells more of them apart."
    ),
    ("quality_diversity.table_1", "sentiment"): (
        "The score is the mean over the domains of all members, so that a subset gives away what only the others know. There "
        "are six pairs of four members, and the process draws one of them. On *parts*, whose members share one task, the same "
        "process is far above random subsets. For unseen domains none of this holds: there it chose worse than chance. With "
        "equal q and centred S, the controls, it is where random subsets are: q is what chooses badly here. On *parts*, too, "
        "two members are no better than random ones without q (four are): it is q that tells the members of little use."
    ),
    ("quality_diversity.table_2", "images"): (
        "One comparison of eight is beyond twice its error, by little. On the same pool with fewer images, measured before, it "
        "was another: task arithmetic of the subset was 4.6 ± 1.8 below all members. 24 images a task and one seed settle "
        "neither."
    ),
}
"""Experiment and pool → why a claim came out so there, as far as it was looked into."""
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
        lines += [f"## All claims\n\n{experiments.counted(frame)}.", ""]
        if apart := experiments.seeds_apart(frame):
            lines += ["Seeds do not come out alike for:", ""]
            lines += [*(f"- {claim}" for claim in apart), ""]
        lines += [Table(bold, words=True).as_markdown(), ""]
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
        if (one.name, one.pool) in READINGS and one is next(own for own in results if own.pool == one.pool):
            lines += [f"Read again: {READINGS[one.name, one.pool]}", ""]
        lines += [f"![{one.name} on {one.pool}]({FIGURES}/{one.key}.svg)", ""] if one.picture() else []
        for table in one.tables():
            lines += [table.as_markdown(), ""]
    return lines
