"""What there is to say of a configuration: problems, all of them in one error, and notes."""

from merging.errors import SettingsError


class Diagnostics:
    """Collects problems and notes while a configuration is read and translated.

    Args:
        where: The file's name, for messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._problems: dict[str, None] = {}
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, and where results differ; each once, in the order in which it came up."""
        return tuple(self._notes)

    def problem(self, key: str, why: str) -> None:
        """Notes that a key is wrong, or cannot be expressed."""
        self._problems[f"{key}: {why}"] = None

    def note(self, text: str) -> None:
        """Notes what a user should know of the result."""
        self._notes[text] = None

    def check(self) -> None:
        """Stops if there are problems.

        Raises:
            SettingsError: There are: every one is in the message.
        """
        if self._problems:
            raise self.error()

    def error(self) -> SettingsError:
        """One error of all problems so far."""
        lines = "\n".join(f"  - {line}" for line in self._problems)
        return SettingsError(f"{self._where} is mergekit's, and no recipe can be made of it:\n{lines}")
