"""Whether RegMean propagated beats RegMean on a campaign's test examples, paired example by example.

    python benchmarks/propagated_vs_regmean.py runs/quickstart --examples 256

Both merge all members of the campaign without labels: RegMean from the campaign's own Gram files (computed here where
there are none), RegMean propagated by running the members on as many unlabelled training examples. Each test example is
answered by both; the standard error is that of the paired difference, the p-value is McNemar's exact one.
"""

import argparse
import time

import numpy as np
import torch
from scipy.stats import binomtest

from flows.config.campaign_file import CAMPAIGN_FILE, load_campaign
from merging.checkpoints.pool import Pool
from merging.evaluation.live_models import best_device
from merging.evaluation.shared_weights import share_weights
from merging.io import addresses, storage
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.propagation import PropagationSettings, propagate
from merging.statistics import STATISTICS, StatisticSettings, StatisticsFile, measure, save
from merging.tasks import make_task


def grams(directory: str, pool: Pool, tasks: dict, examples: int) -> dict[str, StatisticsFile]:
    """Every member's Gram file: of the campaign where it has one of so many examples, else computed beside them."""
    folder = addresses.join(directory, "statistics")
    result = {}
    for member, task in tasks.items():
        checkpoint = pool.members[member].checkpoint
        names = [name for name in storage.list_dir(folder) if name.startswith(f"{member}.gram.")]
        files = [StatisticsFile.open(addresses.join(folder, name)) for name in names]
        fitting = [f for f in files if f.checkpoint == checkpoint.fingerprint and f.examples == examples]
        if fitting:
            result[member] = fitting[0]
            continue
        statistic = STATISTICS["gram"](StatisticSettings(examples=examples))
        path = addresses.join(folder, f"{member}.gram.benchmark-{examples}.safetensors")
        data = task.data_fingerprint("train")
        partial = measure(task, statistic, device=best_device())
        result[member] = save(path, statistic, partial, checkpoint=checkpoint.fingerprint, data=data)
    return result


def main() -> None:
    """Merges both ways and prints the paired comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a finished campaign's directory")
    parser.add_argument("--examples", type=int, default=256, help="unlabelled training examples of each member")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    campaign = load_campaign(addresses.join(arguments.directory, CAMPAIGN_FILE))
    members = {name: member.checkpoint for name, member in campaign.members.items()}
    pool = Pool.open(campaign.base, members, campaign.heads)
    own = {
        member: make_task(task, campaign.tasks[task], path, campaign.base)
        for member, path in members.items()
        if (task := campaign.task_of(member))
    }
    device = best_device()
    out = {name: torch.empty(info.shape, device=device) for name, info in pool.weights.items()}
    models = {}
    for member, task in own.items():
        models[member] = task.load_model().requires_grad_(False)
        share_weights(models[member], pool, pool.members[member], out)
        models[member].to(device)

    def values() -> dict[str, np.ndarray]:
        """What every test example scores under the weights in `out`."""
        return {
            member: task.predict(models[member], arguments.split, np.arange(task.size(arguments.split))).values
            for member, task in own.items()
        }

    material = Material(pool, {"gram": grams(arguments.directory, pool, own, arguments.examples)})
    started = time.perf_counter()
    ResidentMerger(material, out).merge(METHODS["regmean"].default_recipe(list(pool.members)))
    print(f"RegMean: {time.perf_counter() - started:.1f} s, its statistics apart")
    regmean = values()
    started = time.perf_counter()
    settings = PropagationSettings(examples=arguments.examples)
    for name, value in propagate(pool, own, list(pool.members), settings, device).weights.items():
        out[name].copy_(value)
    print(f"RegMean propagated, {arguments.examples} examples per member: {time.perf_counter() - started:.1f} s")
    propagated = values()

    print(
        f"\n{'task':12} {'examples':>8} {'RegMean':>8} {'propagated':>10} {'difference':>18} {'only R / only P':>16} p"
    )
    differences, errors = [], []
    for member in own:
        pair = propagated[member] - regmean[member]
        differences.append(pair.mean())
        errors.append(pair.std(ddof=1) / len(pair) ** 0.5)
        better, worse = int((pair > 0).sum()), int((pair < 0).sum())
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        print(
            f"{member:12} {len(pair):8} {regmean[member].mean():8.4f} {propagated[member].mean():10.4f} "
            f"{differences[-1]:+9.4f} ± {errors[-1]:.4f} {worse:8} / {better:5} {p:.2g}"
        )
    mean, error = float(np.mean(differences)), float(np.sqrt(np.square(errors).sum()) / len(errors))
    print(f"{'mean':12} {'':27} {mean:+10.4f} ± {error:.4f}   {mean / error:.1f} standard errors")


if __name__ == "__main__":
    main()
