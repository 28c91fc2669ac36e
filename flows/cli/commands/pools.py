"""Commands that make a pool: its members, their statistics, or all of it from nothing."""

from typing import Annotated

import typer

from flows.cli.commands.options import Address, File, Quiet, Set, join, load, make_display


def train(
    file: Annotated[
        str,
        typer.Argument(
            help="Train file (base, tasks, training), or a campaign file whose members are missing (YAML).",
            metavar="FILE",
        ),
    ],
    together: Annotated[
        str | None, typer.Option(help="Also train one model on all tasks together, under this name.", metavar="NAME")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Directory of the members, instead of the train file's `out`.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, instead of the file's.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate, instead of the file's.", min=0)] = None,
    seed: Annotated[int | None, typer.Option(help="Of heads and order, instead of the file's.", min=0)] = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tunes the members of a pool on their tasks, any kind that gives logits; what is there already is used again."""
    join(address)
    from flows.cli.train import train as fine_tune

    for path in fine_tune(file, together, out, epochs, learning_rate, seed, make_display(quiet)):
        typer.echo(path)


def statistics(
    file: File,
    kind: Annotated[
        list[str] | None, typer.Option(help="Kinds (fisher, gram, …); by default what the methods need.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Directory for the files; by default the campaign's.")
    ] = None,
    settings: Set = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Computes statistics of every member on its own task, as files that can be published."""
    join(address)
    from flows.campaign.run import compute_statistics

    for path in compute_statistics(load(file, None, None, settings), kind, out, make_display(quiet)):
        typer.echo(path)


def import_statistics(
    file: Annotated[str, typer.Argument(help="Tensors by parameter or layer name (safetensors).", metavar="FILE")],
    kind: Annotated[str, typer.Option(help="fisher, gram or output_gram.")],
    checkpoint: Annotated[str, typer.Option(help="The checkpoint that it is a statistic of.", metavar="DIR")],
    tokens: Annotated[int, typer.Option(help="Real tokens (patches of images) behind it.", min=1)],
    examples: Annotated[int, typer.Option(help="Examples behind it; 0 where nobody knows.", min=0)] = 0,
    sums: Annotated[
        bool, typer.Option("--sums", help="It holds sums over tokens (a Fisher's over examples), not means.")
    ] = False,
    pickle: Annotated[
        bool, typer.Option("--pickle", help="Read a pickle of tensors; nothing that it holds is run.")
    ] = False,
    out: Annotated[
        str | None, typer.Option("--out", help="File to write; by default NAME.KIND.safetensors here.")
    ] = None,
) -> None:
    """Makes statistics that others published ours: names, shapes, symmetry and signs are checked against the checkpoint.

    The file goes under a member's `statistics:`, in place of its data.
    """
    from flows.cli.import_statistics import run as write

    for line in write(file, kind, checkpoint, out, tokens, examples, sums=sums, pickled=pickle):
        typer.echo(line)


def quickstart(
    pool: Annotated[
        str, typer.Option(help="sentiment, tagging (parts of speech), images, language or seq2seq.")
    ] = "sentiment",
    directory: Annotated[
        str | None, typer.Option("--out", help="Directory to fill; default: runs/quickstart, or runs/POOL.")
    ] = None,
    cache: Annotated[str, typer.Option(help="Where downloads are kept.")] = "cache",
    candidates: Annotated[int | None, typer.Option(help="Candidates to evaluate.", min=1)] = None,
    examples: Annotated[
        int | None, typer.Option(help="Examples of each split at most, for a quick look; scores are poor then.", min=16)
    ] = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Builds a real pool (by default MiniLM on four sentiment domains) and runs a real campaign on it."""
    join(address)
    from flows.quickstart.quickstart import run

    typer.echo(run(pool, directory, cache, candidates, make_display(quiet), examples=examples))
