"""Commands that need no campaign: a merge by a recipe, its checkpoint, and the methods that there are."""

import gc
from typing import Annotated

import typer

from flows.cli.commands.options import Quiet, make_display


def merge(
    recipe: Annotated[
        str,
        typer.Argument(help="Recipe file, file of slices, or a mergekit configuration (YAML).", metavar="RECIPE.yaml"),
    ],
    out: Annotated[
        str,
        typer.Option("--out", help="Directory to write, whole or not at all; replaces nothing but an earlier merge."),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default the recipe's, or the base's.")
    ] = None,
    memory: Annotated[float, typer.Option(help="Gigabytes of working memory.", min=0.01, max=1e6)] = 1.0,
    threads: Annotated[int | None, typer.Option(help="Threads; by default one per processor.", min=1)] = None,
    device: Annotated[
        str | None, typer.Option(help="Merge on a device (cuda), whose memory holds base, members and merge.")
    ] = None,
    out_shard_size: Annotated[
        str | None,
        typer.Option(help="Of a file of weights: parameters (5B, 500M) or bytes (2GB); by default 4 GiB."),
    ] = None,
    copy_tokenizer: Annotated[
        bool, typer.Option("--copy-tokenizer/--no-copy-tokenizer", help="Whether tokenizer and chat template go along.")
    ] = True,
    mismatch: Annotated[
        bool, typer.Option(help="Show the gradient mismatch at the recipe's factors, from Fisher statistics.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Merges members by a recipe, without data and without a cluster, and writes a Hugging Face directory."""
    gc.disable()  # the collector would look again and again at what imports make, all of which stays: a tenth of their time
    from flows.cli.merge import Output, merge_recipe

    gc.freeze()
    gc.enable()
    output = Output(out_shard_size, copy_tokenizer, device)
    merge_recipe(recipe, out, dtype, memory, make_display(quiet), mismatch, threads, output)
    typer.echo(out)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Directory whose weights are a pickle (pytorch_model.bin, …), or a mergekit configuration (YAML).",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", help="Directory to write, new or empty; of a configuration, the recipe file (or shown)."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Writes a pickled checkpoint's tensors as safetensors, or a mergekit configuration as a recipe.

    Of a checkpoint, all tensors and every other file; nothing of the pickle is run.
    """
    from flows.cli.convert import convert as write

    typer.echo(write(source, out, make_display(quiet)))


def push(
    directory: Annotated[str, typer.Argument(help="A merged checkpoint.", metavar="DIR")],
    repository: Annotated[str, typer.Argument(help="Where to, on the Hugging Face Hub.", metavar="ORG/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    quiet: Quiet = False,
) -> None:
    """Uploads a merge to the Hugging Face Hub; its card's `base_model` names base and members that are there."""
    from flows.cli.push import push

    typer.echo(push(directory, repository, make_display(quiet), private=private, message=message))


def methods(
    name: Annotated[str | None, typer.Argument(help="One of them, shown whole.", metavar="[NAME]")] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON array, or the object of NAME.")] = False,
) -> None:
    """Lists the merge methods, what they need, and their parameters."""
    from flows.cli.catalogue import print_method, print_methods, print_methods_json

    if json:
        print_methods_json(name)
    elif name is not None:
        print_method(name)
    else:
        print_methods()
