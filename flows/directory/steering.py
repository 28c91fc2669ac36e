"""`mergequest stop` and `enqueue`: small files in a campaign's directory, which its driver looks for now and then."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from merging.errors import MergequestError
from merging.io import addresses, atomic, documents, storage
from merging.mergers import weight_groups
from merging.methods import METHODS
from merging.recipe import GROUP, Recipe, flat
from search.steering import Steering

STOP = "stop.json"
QUEUE = "queue"


class DirectorySteering(Steering):
    """What the files of a directory say. `look` is for a thread beside the search.

    Args:
        directory: The campaign's.
        methods: The campaign's methods.
        members: Its members.
        model_type: The base's, whose methods' defaults complete a recipe.
        weights: Names of the merged weights, which a recipe's groups of weights must fit.
        say: Told, in a line for users, of what is taken and what is not.
    """

    def __init__(
        self,
        directory: str,
        methods: Collection[str],
        members: Collection[str],
        model_type: str,
        weights: Collection[str],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._directory, self._model_type, self._say = directory, model_type, say
        self._methods, self._members, self._weights = methods, members, weights
        self._stopping = False
        self._seen: set[str] = set()
        self._queue: deque[Recipe] = deque()
        self.look()

    def look(self) -> None:
        """Reads what is new.

        Raises:
            StorageError: The store is away.
        """
        if not self._stopping and storage.exists(addresses.join(self._directory, STOP)):
            self._stopping = True
            self._say("stopping: what is in flight is measured")
        place = addresses.join(self._directory, QUEUE)
        for name in storage.list_dir(place):
            if name in self._seen or name.startswith(".") or not name.endswith(".json"):
                continue
            self._seen.add(name)
            try:
                recipe = complete(documents.read_object(addresses.join(place, name)), self._model_type)
                require_fit(recipe, self._methods, self._members)
                weight_groups.check(self._weights, recipe)
            except MergequestError as error:
                self._say(f"{QUEUE}/{name} is not measured: {error}")
                continue
            self._queue.append(recipe)

    def stopping(self) -> bool:
        """Whether somebody gave `mergequest stop`."""
        return self._stopping

    def queued(self) -> Iterable[Recipe]:
        """What somebody gave `mergequest enqueue`, since the last question."""
        while self._queue:
            yield self._queue.popleft()


def request_stop(directory: str) -> None:
    """Asks the driver that is at work on a directory to end once what is in flight has been measured."""
    atomic.write_json(addresses.join(directory, STOP), {})


def forget_stop(directory: str) -> None:
    """Takes away what an earlier run was asked, before this one shows that it is there and can be asked itself."""
    if storage.exists(stop := addresses.join(directory, STOP)):
        storage.remove(stop)


def enqueue(directory: str, recipe: Recipe) -> str:
    """Leaves a recipe for the driver that is, or will be, at work on a directory; returns the file."""
    path = addresses.join(directory, QUEUE, f"{recipe.identity}.json")
    atomic.write_json(path, recipe.as_dict())
    return path


def complete(value: Mapping[str, Any], model_type: str) -> Recipe:
    """A recipe from its file, with all parameters spelled out, as proposals have them.

    Raises:
        MethodError: Method, parameter or value is unknown or out of bounds.
        StorageError: It is no recipe.
    """
    parts = documents.made_from(value, lambda v: (str(v["method"]), dict(v["scaling"]), dict(v["parameters"])), QUEUE)
    method, scaling, parameters = parts
    usual = METHODS[method].defaults(model_type)
    return METHODS[method].complete(Recipe(method, flat(scaling), {**usual, **parameters}))


def require_fit(recipe: Recipe, methods: Collection[str], members: Collection[str]) -> None:
    """Looks whether a campaign, whose statistics are those of its methods, can measure a recipe.

    Raises:
        MergequestError: It cannot.
    """
    if recipe.method not in methods:
        raise MergequestError(
            f"'{recipe.method}' is none of the campaign's methods ({', '.join(methods)}), whose statistics it has"
        )
    if strange := {key.partition(GROUP)[0] for key in recipe.scaling} - set(members):
        raise MergequestError(f"'{min(strange)}' is none of the campaign's members ({', '.join(members)})")
