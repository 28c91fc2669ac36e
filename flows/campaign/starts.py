"""Where theory and gradients say that a search should start, and what statistics predict of a candidate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flows.campaign.open_campaign import Files, OpenCampaign
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from merging.io import atomic, documents, hashing, storage
from merging.mergers import weight_groups
from merging.mergers.linear_basis import is_linear
from merging.methods import METHODS
from merging.optimization.quadratic_model import CURVATURES, Quadratic, minimiser
from merging.recipe import GROUP, Recipe
from ray_tasks.jobs import gradients
from ray_tasks.jobs.parallel import each
from search.space.search_space import Space

FILE = "starts.json"


@dataclass(frozen=True)
class Start:
    """A recipe to measure before the sampler proposes any.

    Args:
        recipe: What to merge.
        stage: `theory` or `gradient`.
        examples: Examples that were run to find it, forward and backward.
    """

    recipe: Recipe
    stage: str
    examples: int = 0


@dataclass(frozen=True)
class Predictor:
    """What quadratic models predict of recipes: how far each member's loss lies above its own.

    Args:
        names: One weight of each group that the models know.
        members: Members, in the models' order.
        forms: Method and parameters → member → its model.
    """

    names: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    forms: Mapping[str, Mapping[str, Quadratic]] | None = None

    def __call__(self, recipe: Recipe) -> dict[str, float]:
        """`theory:<member>` → predicted excess of its loss; empty where there is no model of such recipes."""
        forms = (self.forms or {}).get(_key(recipe))
        subset = recipe.members != self.members
        if forms is None or (subset and recipe.method != "task_arithmetic"):
            return {}
        factors = np.zeros((len(self.names), len(self.members)))
        for own, scaling in weight_groups.split(self.names, recipe):
            for member, factor in scaling.items():
                factors[[self.names.index(name) for name in own], self.members.index(member)] = factor
        return {f"theory:{member}": form(factors) for member, form in forms.items()}


def starts(
    opened: OpenCampaign,
    statistics: Files,
    space: Space,
    directory: Directory,
    display: Display,
) -> tuple[list[Start], Predictor]:
    """The starts that the campaign asks for, found once and kept in its directory.

    Args:
        opened: The campaign.
        statistics: Member → statistics files.
        space: What will be searched.
        directory: Where `starts.json` is kept.
        display: Shows progress.
    """
    path = directory / FILE
    if not storage.exists(path):
        linear = [recipe for recipe in space.baselines() if is_linear(recipe) and recipe.members == space.members]
        linear = [recipe for recipe in linear if recipe.method in opened.campaign.search.methods]
        proposed, about = _theory(opened, statistics, space, linear, display)
        proposed += _gradient(opened, statistics, space, linear, display)
        atomic.write_json(
            path,
            {
                "starts": [
                    {**start.recipe.as_dict(), "stage": start.stage, "examples": start.examples} for start in proposed
                ],
                "theory": about,
            },
        )
    return documents.read_as(path, _read)


def _theory(
    opened: OpenCampaign,
    statistics: Files,
    space: Space,
    linear: Sequence[Recipe],
    display: Display,
) -> tuple[list[Start], dict[str, Any]]:
    """The quadratic models of linear methods as JSON-like values, and their minimisers where they are asked for."""
    kind = next((kind for kind in CURVATURES if kind in opened.kinds), None)
    if not opened.campaign.search.predicts:
        return [], {}
    if kind is None or not linear:
        display.note(
            f"search.theory predicts nothing here: no linear method, or no statistics ({', '.join(CURVATURES)})"
        )
        return [], {}
    parts = weight_groups.split_keys(opened.pool.weights, _spread(space, linear[0]))
    calls = {_key(recipe): (opened.setup(statistics), recipe, [names for names, _ in parts], kind) for recipe in linear}
    with display.bar("percent of the quadratic models", 100) as bar:
        forms = dict(each(gradients.predict, calls, gpus=0.0, progress=lambda share: bar.reach(int(100 * share))))
    proposed = []
    for recipe in linear if opened.campaign.search.theory_starts else ():
        models = list(forms[_key(recipe)].values())
        for shared in (True, False):
            factors = minimiser(models, shared=shared)
            scaling = {
                key: float(factors[row, recipe.members.index(member)])
                for row, (_, keys) in enumerate(parts)
                for member, key in keys.items()
            }
            proposed.append(Start(space.nearest(Recipe(recipe.method, scaling, recipe.parameters)), "theory"))
            if space.scaling == "shared":
                break
    about = {
        "kind": kind,
        "names": [names[0] for names, _ in parts],
        "members": list(linear[0].members),
        "forms": {
            key: {member: form.as_dict() for member, form in models.items()} for key, models in sorted(forms.items())
        },
    }
    return proposed, about


def _gradient(
    opened: OpenCampaign,
    statistics: Files,
    space: Space,
    linear: Sequence[Recipe],
    display: Display,
) -> list[Start]:
    """Where gradient descent leads from the linear methods' defaults, or from the recipe that is given."""
    settings = opened.campaign.search.gradient
    if settings is None:
        return []
    # baselines come in the order of what methods know of the members
    chosen = [recipe for recipe in linear if recipe.method in settings.methods] if settings.methods else linear[:1]
    if settings.start:
        chosen = [METHODS[settings.start.method].complete(settings.start.recipe(), opened.pool.model_type)]
    if not chosen:
        display.note("no method here is linear in its scaling factors, so that there is no gradient to follow")
        return []
    setup = opened.setup(statistics)
    calls = {_key(recipe): (setup, _spread(space, recipe), settings.descent()) for recipe in chosen}
    with display.bar("percent of the gradient descent", 100) as bar:
        waypoints = dict(
            each(
                gradients.descend,
                calls,
                cpus=opened.campaign.resources.threads,
                gpus=0.0,
                retries=opened.campaign.resources.retries,
                progress=lambda share: bar.reach(int(100 * share)),
            )
        )
    return [
        Start(space.nearest(point.recipe), "gradient", point.examples)
        for recipe in chosen
        for point in waypoints[_key(recipe)]
    ]


def _spread(space: Space, recipe: Recipe) -> Recipe:
    """The recipe with a factor for everything that the search varies; the mean of a member's where its own groups differ."""
    own = {
        member: [value for key, value in recipe.scaling.items() if key.partition(GROUP)[0] == member]
        for member in recipe.members
    }
    whole = {member: recipe.scaling.get(member, float(np.mean(values))) for member, values in own.items()}
    scaling = {key: recipe.scaling.get(key, whole[key.partition(GROUP)[0]]) for key in space.keys(recipe)}
    return Recipe(recipe.method, scaling, recipe.parameters)


def _key(recipe: Recipe) -> str:
    """What a basis depends on besides its members."""
    return f"{recipe.method}:{hashing.fingerprint(dict(sorted(recipe.parameters.items())))}"


def _read(value: Mapping[str, Any]) -> tuple[list[Start], Predictor]:
    saved = [
        Start(Recipe(entry["method"], entry["scaling"], entry["parameters"]), entry["stage"], entry["examples"])
        for entry in value["starts"]
    ]
    about = value["theory"]
    if not about:
        return saved, Predictor()
    forms = {
        key: {member: Quadratic.from_dict(form) for member, form in models.items()}
        for key, models in about["forms"].items()
    }
    return saved, Predictor(tuple(about["names"]), tuple(about["members"]), forms)
