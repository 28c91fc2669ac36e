"""The command line. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

import gc
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from flows.config.campaign_file import Campaign
    from flows.directory.progress import Display

# Numpy solves small systems here. Its threads would each spin for a tenth of a second when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

OLD_GROUP = "campaign"
"""What stood before `run`, `resume`, `status` and `check`; this version still reads it, with a note."""
IMPORT = "statistics import"
"""A command of two words, beside `statistics CAMPAIGN.yaml`."""
LOOK = 5.0
"""Seconds between two looks of `status --watch`."""


class Commands(TyperGroup):
    """Ends every command alike: bad input is one message and exit code 2, an interruption 130."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        from merging.errors import MergequestError
        from merging.io.secrets import redacted
        from search.steering import StoppedError

        try:
            return super().invoke(ctx)
        except StoppedError as stopped:
            typer.echo(str(stopped))
            raise typer.Exit from None
        except MergequestError as error:
            if os.environ.get("MERGEQUEST_TRACEBACK"):
                raise
            typer.secho(f"error: {redacted(str(error))}", fg="red", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.secho(
                "stopped: what is finished is kept, and the same command goes on from there",
                fg="yellow",
                err=True,
            )
            raise typer.Exit(130) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that a line begins with; `campaign run` is what `run` was called."""
        if args[:2] == IMPORT.split():
            return IMPORT, self.get_command(ctx, IMPORT), args[2:]
        if args[:1] != [OLD_GROUP]:
            return super().resolve_command(ctx, args)
        rest = args[1:]
        if not rest or rest[0].startswith("-"):
            typer.echo(ctx.get_help())
            raise typer.Exit
        new = f"{ctx.command_path} {rest[0]}"
        typer.secho(f"note: '{ctx.command_path} {OLD_GROUP} {rest[0]}' is '{new}' now", fg="yellow", err=True)
        return super().resolve_command(ctx, rest)


app = typer.Typer(
    cls=Commands,
    help="Search for the best merge of fine-tuned models.",
    epilog="Start with `mergequest init my.yaml`, then `mergequest run my.yaml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
File = Annotated[
    str, typer.Argument(help="Campaign file (YAML); `mergequest init` writes one.", metavar="CAMPAIGN.yaml")
]
Where = Annotated[str, typer.Argument(help="A campaign's directory.", metavar="DIR")]
Out = Annotated[str | None, typer.Option("--out", help="Directory to fill, instead of the file's `directory`.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join (`auto`, or HOST:PORT); by default RAY_ADDRESS, else a local one for this run."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting in place of the file's, checked as if it stood there (`--set search.candidates=200`); may be given "
        "again.",
        metavar="KEY=VALUE",
    ),
]
Candidates = Annotated[int | None, typer.Option(help="Candidates to evaluate: `--set search.candidates=N`.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and results.")]


def _print_version(asked: bool) -> None:
    if asked:
        from flows.versions import code_version

        typer.echo(f"mergequest {code_version()}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if traceback:
        os.environ["MERGEQUEST_TRACEBACK"] = "1"


@app.command()
def init(
    file: Annotated[str, typer.Argument(help="File to write.", metavar="CAMPAIGN.yaml")] = "campaign.yaml",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Writes a commented campaign file to start from, with every setting and its default.

    Beside it lies the file's JSON schema, which editors complete and check it by.
    """
    from flows.cli.template import campaign_template
    from flows.config.campaign_schema import SCHEMA_FILE, campaign_schema
    from flows.config.yaml_file import parent
    from merging.errors import SettingsError
    from merging.io import addresses, atomic, storage

    if storage.exists(file) and not force:
        raise SettingsError(f"{file} is there already: --force replaces it")
    atomic.write_text(file, campaign_template())
    atomic.write_json(addresses.join(parent(file), SCHEMA_FILE), campaign_schema())
    typer.echo(f"Wrote {file}. Name your base, members and tasks in it, then: mergequest run {file}")


@app.command()
def run(
    file: File,
    out: Out = None,
    candidates: Candidates = None,
    settings: Set = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Runs a campaign: statistics, selection, search, test, export, report. Run again, it does only what is missing."""
    _join(address)
    from flows.campaign.run import run

    typer.echo(run(_load(file, out, candidates, settings), _display(quiet)))


@app.command()
def resume(
    directory: Where,
    candidates: Annotated[int | None, typer.Option(help="A new budget: `--set search.candidates=N`.")] = None,
    settings: Set = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure candidates that failed again, when the cause is mended.")
    ] = False,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Goes on with a campaign that was stopped or killed; no finished candidate is lost or repeated.

    Budgets and resources may be set anew (`--set search.seconds=3600`): the search goes on with them.
    """
    _join(address)
    from flows.campaign.run import run
    from flows.directory.campaign_directory import Directory

    campaign = _with(Directory(directory).campaign(), directory, candidates, settings)
    typer.echo(run(campaign, _display(quiet), retry_failed=retry_failed))


@app.command()
def status(
    directory: Where,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per look.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look every few seconds until the campaign ends.")] = False,
) -> None:
    """Says how far a campaign is and whether its driver is alive, from any machine that can read its directory."""
    from rich.console import Console

    from flows.cli.status import read_status

    while True:
        found = read_status(directory)
        if watch and not json and sys.stdout.isatty():
            Console().clear()
        typer.echo(found.as_json() if json else found.as_text())
        if not watch or not found.may_change:
            return
        time.sleep(LOOK)


@app.command()
def stop(
    directory: Where,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
) -> None:
    """Ends a running campaign once what is in flight is measured, from any machine that can write into its directory."""
    from flows.cli.steer import stop

    typer.echo(stop(directory, wait))


@app.command()
def enqueue(
    directory: Where,
    recipe: Annotated[str, typer.Argument(help="Recipe file over the campaign's pool.", metavar="RECIPE.yaml")],
) -> None:
    """Has a campaign measure a recipe before its sampler's next proposal."""
    from flows.cli.steer import enqueue

    typer.echo(enqueue(directory, recipe))


@app.command()
def dashboard(
    directory: Where,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines look.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.", min=0, max=65535)] = 8080,
) -> None:
    """Serves optuna-dashboard from a campaign's ledger, live while it runs (`pip install 'mergequest[dashboard]'`)."""
    from flows.cli.dashboard import make_dashboard

    with make_dashboard(directory, host, port) as server:
        typer.echo(f"http://{host}:{server.server_port}/dashboard  (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


@app.command("ls")
def list_campaigns(
    prefix: Annotated[
        str, typer.Argument(help="A directory or address, or how names in one begin.", metavar="PREFIX")
    ] = "runs",
    json: Annotated[bool, typer.Option("--json", help="One JSON object per campaign.")] = False,
) -> None:
    """Lists the campaigns below a directory or address, with how far each is."""
    from flows.cli.ls import print_campaigns

    print_campaigns(prefix, json)


@app.command()
def check(file: File, settings: Set = None) -> None:
    """Opens and compares everything that a campaign names, and computes nothing."""
    from flows.campaign.run import check

    check(_load(file, None, None, settings), _display(False))
    typer.echo("Nothing is wrong with it.")


@app.command()
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
    _join(address)
    from flows.cli.train import train as fine_tune

    for path in fine_tune(file, together, out, epochs, learning_rate, seed, _display(quiet)):
        typer.echo(path)


@app.command()
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
    _join(address)
    from flows.campaign.run import compute_statistics

    for path in compute_statistics(_load(file, None, None, settings), kind, out, _display(quiet)):
        typer.echo(path)


@app.command(IMPORT)
def statistics_import(
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


@app.command()
def select(file: File, out: Out = None, settings: Set = None, address: Address = None, quiet: Quiet = False) -> None:
    """Selects subsets of members by quality and diversity, and prints them, with q and S."""
    _join(address)
    from flows.campaign.run import run_selection

    selection = run_selection(_load(file, out, None, settings), _display(quiet))
    for line in selection.as_text():
        typer.echo(line)


@app.command()
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
    merge_recipe(recipe, out, dtype, memory, _display(quiet), mismatch, threads, output)
    typer.echo(out)


@app.command()
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

    typer.echo(write(source, out, _display(quiet)))


@app.command()
def evaluate(
    file: File,
    what: Annotated[
        list[str],
        typer.Argument(help="Recipe files, merged checkpoints, members' names, or `base`.", metavar="WHAT…"),
    ],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    mismatch: Annotated[
        bool, typer.Option(help="Show the gradient mismatch at each recipe's factors, from unlabelled train examples.")
    ] = False,
    settings: Set = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Scores recipes, checkpoints or members on a campaign's tasks."""
    _join(address)
    from flows.cli.evaluate import evaluate as score

    score(_load(file, None, None, settings), what, split, _display(quiet), mismatch)


@app.command()
def report(directory: Where) -> None:
    """Writes a campaign's report anew from its ledger, finished or not."""
    from flows.campaign.summary import write_report

    typer.echo(write_report(directory))


@app.command()
def portfolio(
    directory: Where,
    count: Annotated[int, typer.Option("-k", "--count", help="How many.", min=1)] = 5,
    tolerance: Annotated[float, typer.Option(help="How much of the objective diversity is worth.")] = 0.02,
    json: Annotated[bool, typer.Option("--json", help="A JSON array.")] = False,
    export: Annotated[
        bool, typer.Option("--export", help="Write each as a checkpoint, in exports/CANDIDATE of the directory.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Chooses good and different candidates of a campaign, the winner first."""
    from flows.cli.portfolio import as_json, as_text, read_portfolio

    rows, places = read_portfolio(directory, count, tolerance), {}
    if export:
        from flows.cli.winners import export_candidates

        places = export_candidates(directory, rows, _display(quiet))
    typer.echo(as_json(rows, places) if json else "\n".join([as_text(rows), *places.values()]))


@app.command()
def export(
    directory: Where,
    candidate: Annotated[
        str | None,
        typer.Argument(
            help="Its identity, or how that begins; by default the best merge that nothing was distilled into.",
            metavar="[CANDIDATE]",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Writes a campaign's candidate as a checkpoint, in exports/CANDIDATE of the directory."""
    from flows.cli.winners import export_candidates, find_candidate

    row = find_candidate(directory, candidate)
    typer.echo(export_candidates(directory, [row], _display(quiet))[row.candidate])


@app.command()
def push(
    directory: Annotated[str, typer.Argument(help="A merged checkpoint.", metavar="DIR")],
    repository: Annotated[str, typer.Argument(help="Where to, on the Hugging Face Hub.", metavar="ORG/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    quiet: Quiet = False,
) -> None:
    """Uploads a merge to the Hugging Face Hub; its card's `base_model` names base and members that are there."""
    from flows.cli.push import push

    typer.echo(push(directory, repository, _display(quiet), private=private, message=message))


@app.command()
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


@app.command()
def submit(
    file: File,
    address: Annotated[
        str, typer.Option(help="Dashboard of the cluster (http://HOST:8265).")
    ] = "http://127.0.0.1:8265",
    out: Out = None,
    candidates: Candidates = None,
    settings: Set = None,
    what: Annotated[str, typer.Option(help="campaign, statistics, or merge (FILE is a recipe then).")] = "campaign",
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends, and exit as it does.")] = True,
) -> None:
    """Runs a campaign, its statistics or a merge as a job of a Ray cluster; Ctrl-C while following stops the job.

    The program and the resolved file travel; checkpoints, data and the directory to fill stay where they are, and every
    node must see them there (a shared file system, or s3:// addresses).
    """
    from flows.cli.submit import submit as send

    raise typer.Exit(send(file, address, out, follow, _assignments(candidates, settings), what))


@app.command()
def quickstart(
    pool: Annotated[str, typer.Option(help="sentiment, tagging (parts of speech), images or language.")] = "sentiment",
    directory: Annotated[
        str | None, typer.Option("--out", help="Directory to fill; default: runs/quickstart, or runs/POOL.")
    ] = None,
    cache: Annotated[str, typer.Option(help="Where downloads are kept.")] = "cache",
    candidates: Annotated[int | None, typer.Option(help="Candidates to evaluate.", min=1)] = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Builds a real pool (by default MiniLM on four sentiment domains) and runs a real campaign on it."""
    _join(address)
    from flows.quickstart.quickstart import run

    typer.echo(run(pool, directory, cache, candidates, _display(quiet)))


def main() -> None:
    """Entry point of `mergequest`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` ends it as Ctrl-C does
    app()


def _join(address: str | None) -> None:
    """Ray reads its address from the environment when it is imported."""
    if address:
        os.environ["RAY_ADDRESS"] = address


def _display(quiet: bool) -> "Display":
    from rich.console import Console

    from flows.directory.progress import Display

    return Display(Console(stderr=True, quiet=quiet))


def _load(file: str, out: str | None, candidates: int | None, settings: list[str] | None) -> "Campaign":
    from flows.config.campaign_file import load_campaign

    return _with(load_campaign(file, _assignments(candidates, settings)), out)


def _assignments(candidates: int | None, settings: list[str] | None) -> list[str]:
    """What the command line sets in place of the file's settings."""
    return [*(settings or []), *([] if candidates is None else [f"search.candidates={candidates}"])]


def _with(
    campaign: "Campaign", out: str | None, candidates: int | None = None, settings: list[str] | None = None
) -> "Campaign":
    """The campaign with what the command line says instead."""
    from flows.config.campaign_file import Campaign
    from flows.config.overrides import with_overrides
    from flows.config.yaml_file import validate
    from merging.io import addresses

    changed = with_overrides(campaign.model_dump(mode="json"), _assignments(candidates, settings))
    if out is not None:
        changed["directory"] = addresses.absolute(out)
    return validate(Campaign, changed, "command line")
