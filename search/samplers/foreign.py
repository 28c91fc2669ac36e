"""Samplers that are not ours to name: any of OptunaHub's, and the user's own."""

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from merging.errors import MergequestError, SettingsError
from merging.io.secrets import described
from merging.tasks.user_functions import search_last

HUB = "optunahub:"
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_ON_HUB = re.compile(rf"{HUB}(?P<package>[\w./-]+?)(?:@(?P<ref>[\w.-]+))?(?::(?P<attribute>[A-Za-z_]\w*))?")


def is_foreign(name: str) -> bool:
    """Whether a name is `module:attribute` or `optunahub:PACKAGE`."""
    return ":" in name


def require_form(name: str) -> None:
    """Looks at a foreign sampler's name; nothing is imported or fetched.

    Raises:
        SettingsError: It is none.
    """
    if not (_ON_HUB if name.startswith(HUB) else _OWN).fullmatch(name):
        raise SettingsError(
            f"sampler '{name}': expected optunahub:samplers/NAME (or optunahub:samplers/NAME@REF:CLASS), or module:attribute"
        )


def make_foreign(name: str, seed: int, arguments: Mapping[str, Any] | None = None) -> BaseSampler:
    """A foreign sampler, made of its arguments, and of the campaign's seed where it takes one.

    Args:
        name: `optunahub:samplers/NAME[@REF][:CLASS]` (or the directory of such a package on this machine), or
            `module:attribute` on Python's path or in the working directory: a class, or a function that returns a sampler.
        seed: The campaign's.
        arguments: Its arguments.

    Raises:
        SettingsError: It cannot be had, or refuses its arguments.
    """
    require_form(name)
    if name.startswith(HUB):
        make = _on_hub(name)
    else:
        place, _, attribute = name.partition(":")
        make = getattr(_own_module(name, place), attribute, None)
        if not callable(make):
            raise SettingsError(f"sampler '{name}': module '{place}' has no class or function '{attribute}'")
    chosen = dict(arguments or {})
    try:
        if "seed" in inspect.signature(make).parameters:
            chosen.setdefault("seed", seed % (1 << 32))
        sampler = make(**chosen)
    except Exception as error:  # foreign code
        raise SettingsError(f"sampler '{name}' refuses its arguments: {described(error, 300)}") from error
    if not isinstance(sampler, BaseSampler):
        raise SettingsError(f"sampler '{name}' gave a {type(sampler).__name__}, and no sampler of Optuna's")
    return ForeignSampler(name, sampler)


class ForeignSampler(BaseSampler):
    """A sampler that lasts as long as the search, and hears of its trials' ends before it proposes anew.

    Args:
        name: For messages.
        sampler: Itself.
    """

    def __init__(self, name: str, sampler: BaseSampler) -> None:
        self._name, self._sampler = name, sampler
        self._waiting: set[int] = set()

    def reseed_rng(self) -> None:
        """See `BaseSampler`."""
        self._sampler.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """See `BaseSampler`; first what came of earlier trials."""
        for done in study.get_trials(deepcopy=False) if self._waiting else ():
            if done.number in self._waiting and done.state.is_finished():
                self._waiting.discard(done.number)
                self._call("after_trial", study, done, done.state, done.values)
        self._waiting.add(trial.number)
        self._call("before_trial", study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `BaseSampler`."""
        return dict(self._call("infer_relative_search_space", study, trial))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `BaseSampler`."""
        return dict(self._call("sample_relative", study, trial, search_space))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See `BaseSampler`."""
        return self._call("sample_independent", study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Nothing: it hears of it in `before_trial`."""

    def _call(self, what: str, *arguments: Any) -> Any:
        try:
            return getattr(self._sampler, what)(*arguments)
        except RuntimeError as error:
            if what == "after_trial" and "stop" in str(error):  # Study.stop, which only optimize() allows
                return None
            self._refuse(error)
        except MergequestError:
            raise
        except Exception as error:  # foreign code
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        raise SettingsError(f"sampler '{self._name}' failed: {described(error, 300)}") from error


def _own_module(name: str, module: str) -> ModuleType:
    search_last(str(Path.cwd()))
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # foreign code
        raise SettingsError(
            f"sampler '{name}': cannot import '{module}' ({described(error, 300)}): put it on PYTHONPATH or into the working "
            "directory"
        ) from error


def _on_hub(name: str) -> Any:
    """The class of a package of OptunaHub's."""
    if find_spec("optunahub") is None:
        raise SettingsError(f"sampler '{name}': OptunaHub is not installed: pip install 'mergequest[optunahub]'")
    import optunahub

    parts = _ON_HUB.fullmatch(name)
    assert parts is not None
    package, ref, attribute = parts["package"], parts["ref"], parts["attribute"]
    try:
        if Path(package).is_dir():
            place = Path(package).resolve()
            module = optunahub.load_local_module(place.name, registry_root=str(place.parent))
        else:
            module = optunahub.load_module(package, ref=ref or "main")
    except (Exception, SystemExit) as error:  # of the hub, of the network, of the package
        raise SettingsError(
            f"sampler '{name}' cannot be had from OptunaHub: {described(error, 300)}\nIs there a network? Without one, name "
            "the directory of the package: optunahub:DIR/samplers/NAME"
        ) from error
    if attribute is not None:
        if not hasattr(module, attribute):
            raise SettingsError(f"sampler '{name}': the package has no '{attribute}'")
        return getattr(module, attribute)
    public = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith("_")]
    samplers = [
        value
        for value in (getattr(module, key, None) for key in public)
        if isinstance(value, type) and issubclass(value, BaseSampler) and not value.__module__.startswith("optuna.")
    ]
    if len(samplers) != 1:
        names = ", ".join(sampler.__name__ for sampler in samplers) or "none"
        raise SettingsError(f"sampler '{name}': the package has {names} of that kind: name one, {name}:CLASS")
    return samplers[0]
