"""Which statistics a campaign lacks, and where those are that it has: published, cached by content, or computed now."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flows.campaign.cluster import connected, require_room_to_start
from flows.campaign.open_campaign import OpenCampaign
from flows.campaign.regime import require_room_for_a_model
from flows.config.campaign_file import Campaign
from flows.config.search_settings import WITH_DATA
from flows.directory.progress import Display
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import MethodError, PoolError, StatisticsError, TaskError
from merging.io import addresses, hashing, storage
from merging.mergers.material import subset_fingerprint
from merging.methods import METHODS
from merging.recipe import BASE
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticSettings, StatisticsFile, number_of_examples
from merging.tasks.task import Split, Task
from ray_tasks.connect import device_each
from ray_tasks.jobs.propagation import PropagationJob, solve
from ray_tasks.jobs.statistics import BoundTask, Job, compute


def cache_of(campaign: Campaign) -> str:
    """Directory of the statistics that a campaign computes."""
    return campaign.statistics.cache or addresses.join(campaign.directory or ".", "statistics")


def member_statistics(
    opened: OpenCampaign, kinds: Sequence[str], cache: str, display: Display
) -> dict[str, tuple[str, ...]]:
    """Files of the given kinds for every member: published ones as they are, the rest computed where they are missing.

    For the base, too, where a method asks for its own.

    Args:
        opened: The campaign.
        kinds: Kinds of statistic.
        cache: Directory of computed files.
        display: Shows progress.

    Returns:
        Member → paths, one per kind.

    Raises:
        StatisticsError: A published file is unusable, or a member has neither file nor data.
    """
    published = published_statistics(opened)
    own_kinds = [kind for kind in opened.base_kinds if kind in kinds]
    jobs = _jobs(opened, published, kinds, own_kinds, cache)
    run(jobs.values(), opened, display)
    by_member = {
        member: tuple(published[member].get(kind) or jobs[member, kind].path for kind in kinds)
        for member in opened.pool.members
    }
    base = tuple(published[BASE].get(kind) or jobs[BASE, kind].path for kind in own_kinds)
    return by_member | ({BASE: base} if base else {})


def require_sources(opened: OpenCampaign) -> None:
    """Looks whether all statistics that the campaign will ask for have a file or data; computes nothing.

    Raises:
        StatisticsError: As `member_statistics`, `solutions` and `representations` would, after the work before them.
    """
    cache = cache_of(opened.campaign)
    _jobs(opened, published_statistics(opened), opened.kinds, opened.base_kinds, cache)
    if any(method.needs(parameters).whole for method, parameters in opened.variants()):
        for member in opened.pool.members:
            _own_job(opened, member, "gram", cache)


def solutions(opened: OpenCampaign, cache: str, display: Display) -> dict[str, tuple[str, ...]]:
    """Files with the solutions that the campaign's methods ask for of all members together, computed where missing.

    Returns:
        Names of the members joined by + → paths; empty where no method asks.
    """
    campaign = opened.campaign
    if not any(method.needs(parameters).whole for method, parameters in opened.variants()):
        return {}
    members = sorted(opened.pool.members)
    bound, data = {}, {}
    for member in members:
        job = _own_job(opened, member, "gram", cache)  # the same data and the same complaints as any statistic
        bound[member], data[member] = job.data, job.fingerprints["data"]
    settings = campaign.statistics.propagated
    key = {"statistic": "propagated", "version": 1, **settings.model_dump(mode="json", exclude={"batch_size"})}
    if campaign.vocabulary != "base":
        key["vocabulary"] = campaign.vocabulary
    checkpoint = subset_fingerprint(opened.pool, members)
    path = solution_path(opened, "propagated", members, [data, key], cache)
    if not storage.exists(path):
        paths = {name: member.checkpoint for name, member in campaign.members.items()}
        digest = hashing.fingerprint(data)
        whole = PropagationJob(
            campaign.base, paths, campaign.heads, bound, settings, key, path, checkpoint, digest, campaign.vocabulary
        )
        resources = campaign.resources
        with connected(opened.campaign) as cluster, display.bar("percent of the propagated solution", 100) as bar:
            require_room_for_a_model(opened, cluster, "solving layer by layer (leave out regmean_propagated)")
            solve(
                whole,
                threads=resources.threads,
                gpus=device_each(resources.gpus),
                retries=resources.retries,
                nodes=opened.nodes,
                progress=lambda share: bar.reach(int(100 * share)),
            )
    return {"+".join(members): (path,)}


def solution_path(opened: OpenCampaign, kind: str, members: Sequence[str], others: Sequence[Any], cache: str) -> str:
    """The file of a solution of members as a whole, whose name tells everything that its contents depend on.

    Args:
        opened: The campaign, for what is merged, and who has which weights: examples go by the names of members, too.
        kind: Kind of statistic.
        members: Names of the members.
        others: Examples, settings, and what else it depends on; JSON-like.
        cache: Its directory.
    """
    prints = opened.pool.fingerprints()
    checkpoints = {name: prints[name] for name in (BASE, *members)}
    merged = {name: list(info.shape) for name, info in opened.pool.weights.items()}
    fingerprint = hashing.fingerprint([checkpoints, opened.pool.configurations(), merged, *others])
    return addresses.join(cache, f"pool.{kind}.{fingerprint}.safetensors")


def usable_solutions(
    opened: OpenCampaign, cache: str, display: Display
) -> tuple[OpenCampaign, dict[str, tuple[str, ...]]]:
    """The solutions that methods ask for; of methods that the file did not name, one that cannot be solved is left out."""
    try:
        return opened, solutions(opened, cache, display)
    except (MethodError, PoolError, TaskError) as error:
        search = opened.campaign.search
        if tuple(search.methods) != WITH_DATA:
            raise
        left = {name: space for name, space in search.methods.items() if METHODS[name].solution is None}
        display.note(f"without {', '.join(search.methods.keys() - left.keys())}: {error}")
        campaign = opened.campaign.model_copy(update={"search": search.model_copy(update={"methods": left})})
        return replace(opened, campaign=campaign), {}


def joined(first: Mapping[str, tuple[str, ...]], second: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Both files of everybody: a pool of one member has its own statistics and its solutions under one name."""
    return {who: (*first.get(who, ()), *second.get(who, ())) for who in {**first, **second}}


def representations(opened: OpenCampaign, cache: str, display: Display) -> dict[str, dict[str, str]]:
    """Files with every member's representations of the same examples: some of a split of each task, `selection.examples`.

    Of train examples, calibration data stand in for the tasks of members that have them.

    Returns:
        Member → source → path.
    """
    shown = _shown(opened)
    jobs = {
        (member, source): _representation_job(opened, member, source, cache)
        for member in opened.pool.members
        for source in shown
    }
    run(jobs.values(), opened, display)
    return {member: {source: jobs[member, source].path for source in shown} for member in opened.pool.members}


def require_representations(opened: OpenCampaign) -> None:
    """Looks whether `representations` would find its examples and models; computes nothing.

    Raises:
        StatisticsError: A member has no source that loads its model, or a source lacks the split.
    """
    statistic = STATISTICS["representation"](opened.campaign.statistics.representation)
    for task in _shown(opened).values():
        number_of_examples(task, statistic, opened.campaign.selection.examples)
        for member in opened.pool.members:
            _require_own_source(opened, member)


def run(jobs: Iterable[Job], opened: OpenCampaign, display: Display) -> None:
    """Computes the jobs whose files are not there yet.

    Raises:
        ClusterError: No node is of the kind that the campaign asks for.
    """
    resources, settings = opened.campaign.resources, opened.campaign.statistics
    todo = [job for job in jobs if not storage.exists(job.path)]
    if not todo:
        return
    with connected(opened.campaign) as cluster, display.bar("examples", sum(job.examples for job in todo)) as bar:
        gpus = device_each(resources.gpus)
        require_room_to_start(opened.campaign, cluster, gpus)
        require_room_for_a_model(
            opened, cluster, f"measuring {todo[0].kind} statistics (leave out what needs them, or name files)"
        )
        compute(
            todo,
            shard=settings.shard,
            threads=resources.threads,
            gpus=gpus,
            retries=resources.retries,
            nodes=opened.nodes,
            progress=lambda job, examples: bar.advance(examples, f"{job.member} {job.kind}"),
        )


def published_statistics(opened: OpenCampaign) -> Mapping[str, Mapping[str, str]]:
    """Member → kind → path of the files that the campaign names, each checked against its checkpoint.

    Raises:
        StatisticsError: A file is damaged, belongs to another checkpoint, or is the second one of its kind.
    """
    published: dict[str, dict[str, str]] = {member: {} for member in (BASE, *opened.pool.members)}
    named = {member: settings.statistics for member, settings in opened.campaign.members.items()}
    for who, paths in (named | {BASE: opened.campaign.base_data.statistics}).items():
        for path in paths:
            file = StatisticsFile.open(path)
            checkpoint = _checkpoint(opened, who)
            file.check(checkpoint.fingerprint, checkpoint.tensors)
            one = published[who].setdefault(file.kind, path)
            if one != path:
                raise StatisticsError(
                    f"{who} has two files with the statistic '{file.kind}', {one} and {path}: name one of them"
                )
    return published


def published_files(opened: OpenCampaign) -> dict[str, tuple[str, ...]]:
    """Member → paths of the files that the campaign names."""
    return {member: tuple(files.values()) for member, files in published_statistics(opened).items() if files}


def _jobs(
    opened: OpenCampaign,
    published: Mapping[str, Mapping[str, str]],
    kinds: Sequence[str],
    base_kinds: Sequence[str],
    cache: str,
) -> dict[tuple[str, str], Job]:
    """What stands in for files that nobody published, of members and base."""
    jobs = {
        (member, kind): _own_job(opened, member, kind, cache)
        for member in opened.pool.members
        for kind in kinds
        if kind not in published[member]
    }
    return jobs | {(BASE, kind): _base_job(opened, kind, cache) for kind in base_kinds if kind not in published[BASE]}


def _own_job(opened: OpenCampaign, member: str, kind: str, cache: str) -> Job:
    """A statistic of a member on its own examples."""
    source = opened.campaign.source_of(member)
    if source is None or not opened.sources[source].has_logits:
        raise StatisticsError(
            f"'{member}' has no examples to compute its {kind} from: give it a `task` with data or `calibration` data, name a "
            f"published file under members.{member}.statistics, or leave the methods that need it out of search.methods"
        )
    bound = _own_model(opened, member, source)
    return _job(opened, member, kind, bound, bound, addresses.join(cache, f"{member}.{kind}"))


def _estimated(task: Task, kind: str, settings: StatisticSettings) -> StatisticSettings:
    """A statistic's settings for a task, the estimator spelled out.

    Raises:
        StatisticsError: The task has no label for it, or one for every token.
    """
    if not isinstance(settings, LikelihoodSettings):
        return settings
    field, estimator = f"statistics.{kind}.estimator", settings.chosen(task.one_label)
    if estimator == "exact" and not task.one_label:
        raise StatisticsError(
            f"{field}: 'exact' is for one label an example, and '{task.name}' ({task.kind}) has one for every token: set it to "
            "sampled or empirical, or leave it out"
        )
    if estimator == "empirical" and not task.settings.is_labelled:
        raise StatisticsError(
            f"{field}: 'empirical' needs labels, and '{task.name}' has none: set it to exact or sampled, or leave it out"
        )
    return settings.model_copy(update={"estimator": estimator})


def _own_model(opened: OpenCampaign, member: str, source: str) -> BoundTask:
    """A source that loads the member's own model."""
    settings, _ = opened.campaign.sources()[source]
    return BoundTask(source, settings, opened.pool.members[member].checkpoint.path, opened.campaign.base)


def _base_job(opened: OpenCampaign, kind: str, cache: str) -> Job:
    """A statistic of the base on its own data, with its own head."""
    campaign = opened.campaign
    task = campaign.base_data.task
    if task is None or not opened.tasks[task].has_logits:
        raise StatisticsError(
            f"the base has no task with data to compute its {kind} from: set base_data.task, or name a published file under "
            "base_data.statistics"
        )
    bound = BoundTask(task, campaign.tasks[task], campaign.base)
    try:
        return _job(opened, BASE, kind, bound, bound, addresses.join(cache, f"{BASE}.{kind}"))
    except TaskError as error:
        raise StatisticsError(
            f"base_data.task: the base has no head of its own for '{task}' ({error}). Name a task that it was trained on, or a "
            "published file under base_data.statistics, or leave base_curvature at 'identity'"
        ) from error


def _checkpoint(opened: OpenCampaign, who: str) -> Checkpoint:
    """A member's checkpoint, or the base."""
    return opened.pool.base if who == BASE else opened.pool.members[who].checkpoint


def _require_own_source(opened: OpenCampaign, member: str) -> str:
    """The source that a member's model is loaded by."""
    own = opened.campaign.source_of(member)
    if own is None or not opened.sources[own].has_logits:
        raise StatisticsError(
            f"'{member}' has no task that loads its model for representations: give it a `task` or `calibration` data, or set "
            "selection.similarity to 'task-vector'"
        )
    return own


def _representation_job(opened: OpenCampaign, member: str, source: str, cache: str) -> Job:
    """A member's representations of any source's examples, as that source's own head prepares them."""
    campaign, shown = opened.campaign, _shown(opened)[source]
    settings = campaign.sources()[source][0] if source in campaign.sources() else campaign.tasks[source]
    data = BoundTask(source, settings, shown.head, campaign.base)
    model = _own_model(opened, member, _require_own_source(opened, member))
    prefix = addresses.join(cache, f"{member}.representation.{source}")
    return _job(opened, member, "representation", data, model, prefix, campaign.selection.examples)


def _shown(opened: OpenCampaign) -> Mapping[str, Task]:
    """Whose examples all members are shown: the sources of statistics, or the tasks where they are to be of another split."""
    shown = opened.sources if opened.campaign.selection.examples == "train" else opened.tasks
    return {name: task for name, task in shown.items() if task.has_logits}


def _job(
    opened: OpenCampaign, member: str, kind: str, data: BoundTask, model: BoundTask, prefix: str, split: Split = "train"
) -> Job:
    """The job whose file's name tells everything that its contents depend on."""
    known = {**opened.tasks, **opened.sources}[data.name]
    task = known if data.head == known.head else data.open()
    settings = _estimated(task, kind, getattr(opened.campaign.statistics, kind))
    statistic = STATISTICS[kind](settings)
    examples = number_of_examples(task, statistic, split)
    checkpoint = _checkpoint(opened, member)
    fingerprints = {"checkpoint": checkpoint.fingerprint, "data": task.data_fingerprint(split)}
    key = hashing.fingerprint([fingerprints, checkpoint.config_fingerprint, statistic.key(), examples])
    return Job(member, kind, settings, data, model, split, examples, f"{prefix}.{key}.safetensors", fingerprints)
