"""Which statistics a campaign lacks, and where those are that it has: published, cached by content, or computed now."""

from collections.abc import Iterable, Mapping, Sequence

from flows.opening import Opened
from flows.progress import Display
from merging import storage
from merging.errors import StatisticsError
from merging.methods import BASE
from merging.statistics import STATISTICS, StatisticsFile, number_of_examples
from merging.tasks import make_task
from ray_tasks.statistics import Job, compute


def member_statistics(
    opened: Opened, kinds: Sequence[str], cache: str, display: Display
) -> dict[str, tuple[str, ...]]:
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


def representations(opened: Opened, cache: str, display: Display) -> dict[str, dict[str, str]]:
    """Files with every member's representations of the same examples: some of each task's training split.

    Returns:
        Member → task → path.
    """
    jobs = {
        (member, task): _job(opened, member, "representation", task, cache)
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


def _own_job(opened: Opened, member: str, kind: str, cache: str) -> Job:
    """A statistic of a member on its own task."""
    task = opened.campaign.task_of(member)
    if task is None or not opened.tasks[task].has_logits:
        methods = [name for name in opened.campaign.search.methods]
        raise StatisticsError(
            f"'{member}' has no task with data to compute its {kind} from: give it a `task`, name a published file under "
            f"members.{member}.statistics, or leave the methods that need it out of search.methods ({', '.join(methods)})"
        )
    return _job(opened, member, kind, task, cache)


def _job(opened: Opened, member: str, kind: str, task: str, cache: str) -> Job:
    campaign = opened.campaign
    settings = getattr(campaign.statistics, kind)
    checkpoint = opened.pool.members[member].checkpoint
    bound = make_task(task, campaign.tasks[task], checkpoint.path)
    statistic = STATISTICS[kind](settings)
    examples = number_of_examples(bound, statistic)
    fingerprints = {"checkpoint": checkpoint.fingerprint, "data": bound.data_fingerprint("train")}
    key = storage.fingerprint([fingerprints, statistic.key(), examples])
    about = f"{member}.{kind}" if kind != "representation" else f"{member}.{kind}.{task}"
    path = storage.join(cache, f"{about}.{key}.safetensors")
    return Job(
        member, kind, settings, checkpoint.path, task, campaign.tasks[task], "train", examples, path, fingerprints
    )
