"""Which statistics a campaign lacks, and where those are that it has: published, cached by content, or computed now."""

from collections.abc import Iterable, Mapping, Sequence

from flows.opening import Opened
from flows.progress import Display
from merging import storage
from merging.errors import StatisticsError
from merging.merge import subset_fingerprint
from merging.methods import BASE, METHODS
from merging.statistics import STATISTICS, StatisticsFile, number_of_examples
from ray_tasks.calls import each
from ray_tasks.propagation import solve
from ray_tasks.statistics import BoundTask, Job, compute


def member_statistics(opened: Opened, kinds: Sequence[str], cache: str, display: Display) -> dict[str, tuple[str, ...]]:
    """Files of the given kinds for every member: published ones as they are, the rest computed where they are missing.

    Args:
        opened: The campaign.
        kinds: Kinds of statistic.
        cache: Directory of computed files.
        display: Shows progress.

    Returns:
        Member → paths, one a kind.

    Raises:
        StatisticsError: A published file is unusable, or a member has neither file nor data.
    """
    published = published_statistics(opened)
    jobs = {
        (member, kind): _own_job(opened, member, kind, cache)
        for member in opened.pool.members
        for kind in kinds
        if kind not in published[member]
    }
    run(jobs.values(), opened, display)
    return {
        member: tuple(published[member].get(kind) or jobs[member, kind].path for kind in kinds)
        for member in opened.pool.members
    }


def solutions(opened: Opened, cache: str, display: Display) -> dict[str, tuple[str, ...]]:
    """Files with the solutions that the campaign's methods ask for of all members together, computed where missing.

    Returns:
        Names of the members joined by + → paths; empty where no method asks.
    """
    campaign = opened.campaign
    if not any(METHODS[name].solution for name in campaign.search.methods):
        return {}
    members = sorted(opened.pool.members)
    bound, data = {}, {}
    for member in members:
        job = _own_job(opened, member, "gram", cache)  # the same data and the same complaints as any statistic
        bound[member], data[member] = job.data, job.fingerprints["data"]
    settings = campaign.statistics.propagated
    key = {"statistic": "propagated", "version": 1, **settings.model_dump(mode="json", exclude={"batch_size"})}
    checkpoint = subset_fingerprint(opened.pool, members)
    fingerprint = storage.fingerprint([checkpoint, data, key])
    path = storage.join(cache, f"pool.propagated.{fingerprint}.safetensors")
    if not storage.exists(path):
        paths = {name: member.checkpoint for name, member in campaign.members.items()}
        call = (campaign.base, paths, campaign.heads, bound, settings, key, path, checkpoint, storage.fingerprint(data))
        with display.bar("percent of the propagated solution", 100) as bar:
            list(each(solve, {"pool": call}, progress=lambda share: bar.reach(int(100 * share))))
    return {"+".join(members): (path,)}


def representations(opened: Opened, cache: str, display: Display) -> dict[str, dict[str, str]]:
    """Files with every member's representations of the same examples: some of each task's training split.

    Returns:
        Member → task → path.
    """
    jobs = {
        (member, task): _representation_job(opened, member, task, cache)
        for member in opened.pool.members
        for task in opened.tasks
        if opened.tasks[task].has_logits
    }
    run(jobs.values(), opened, display)
    return {
        member: {task: jobs[member, task].path for task in opened.tasks if (member, task) in jobs}
        for member in opened.pool.members
    }


def run(jobs: Iterable[Job], opened: Opened, display: Display) -> None:
    """Computes the jobs whose files are not there yet."""
    resources, settings = opened.campaign.resources, opened.campaign.statistics
    todo = [job for job in jobs if not storage.exists(job.path)]
    if not todo:
        return
    with display.bar("examples", sum(job.examples for job in todo)) as bar:
        compute(
            todo,
            shard=settings.shard,
            threads=resources.threads,
            gpus=resources.gpus or 0.0,
            retries=resources.retries,
            progress=lambda job, examples: bar.advance(examples, f"{job.member} {job.kind}"),
        )


def published_statistics(opened: Opened) -> Mapping[str, Mapping[str, str]]:
    """Member → kind → path of the files that the campaign names, each checked against its checkpoint.

    Raises:
        StatisticsError: A file is damaged or belongs to another checkpoint.
    """
    found: dict[str, dict[str, str]] = {member: {} for member in (BASE, *opened.pool.members)}
    for member, settings in opened.campaign.members.items():
        for path in settings.statistics:
            file = StatisticsFile.open(path)
            checkpoint = opened.pool.members[member].checkpoint
            file.check(checkpoint.fingerprint, checkpoint.tensors)
            found[member][file.kind] = path
    return found


def published_files(opened: Opened) -> dict[str, tuple[str, ...]]:
    """Member → paths of the files that the campaign names."""
    return {member: tuple(found.values()) for member, found in published_statistics(opened).items() if found}


def _own_job(opened: Opened, member: str, kind: str, cache: str) -> Job:
    """A statistic of a member on its own task."""
    task = opened.campaign.task_of(member)
    if task is None or not opened.tasks[task].has_logits:
        raise StatisticsError(
            f"'{member}' has no task with data to compute its {kind} from: give it a `task`, name a published file "
            f"under members.{member}.statistics, or leave the methods that need it out of search.methods"
        )
    checkpoint = opened.pool.members[member].checkpoint
    bound = BoundTask(task, opened.campaign.tasks[task], checkpoint.path)
    return _job(opened, member, kind, bound, bound, storage.join(cache, f"{member}.{kind}"))


def _representation_job(opened: Opened, member: str, task: str, cache: str) -> Job:
    """A member's representations of any task's examples, as that task's own head prepares them."""
    campaign = opened.campaign
    own = campaign.task_of(member)
    if own is None:
        raise StatisticsError(
            f"'{member}' has no task that loads its model for representations: give it a `task`, or set "
            "selection.similarity to 'task-vector'"
        )
    data = BoundTask(task, campaign.tasks[task], opened.tasks[task].head)
    model = BoundTask(own, campaign.tasks[own], opened.pool.members[member].checkpoint.path)
    return _job(opened, member, "representation", data, model, storage.join(cache, f"{member}.representation.{task}"))


def _job(opened: Opened, member: str, kind: str, data: BoundTask, model: BoundTask, prefix: str) -> Job:
    """The job whose file's name tells everything that its contents depend on."""
    settings = getattr(opened.campaign.statistics, kind)
    statistic = STATISTICS[kind](settings)
    task = data.open() if data.head != opened.tasks[data.name].head else opened.tasks[data.name]
    examples = number_of_examples(task, statistic)
    checkpoint = opened.pool.members[member].checkpoint.fingerprint
    fingerprints = {"checkpoint": checkpoint, "data": task.data_fingerprint("train")}
    key = storage.fingerprint([fingerprints, statistic.key(), examples])
    return Job(member, kind, settings, data, model, "train", examples, f"{prefix}.{key}.safetensors", fingerprints)
