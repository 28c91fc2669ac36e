"""The setting that says whose tokenizer, chat templates and generation settings a merge has."""

from collections.abc import Collection

from pydantic import Field

from flows.config.yaml_file import Settings, require_known
from merging.checkpoints.directories.borrowed_files import Files, borrowed_files, notes_on_files
from merging.checkpoints.pool import Pool
from merging.errors import PoolError
from merging.recipe import BASE


class FilesFrom(Settings):
    """Whose small files a merge has: `base`, or a member's name. All other files are the base's."""

    tokenizer: str = Field(BASE, description="Whose tokenizer; a member's only if its tokens have the base's numbers.")
    chat_template: str | None = Field(
        None, description="Whose chat templates; by default those that come with the tokenizer."
    )
    generation_config: str = Field(BASE, description="Whose generation_config.json.")

    def check(self, members: Collection[str]) -> None:
        """Looks whether all names are known.

        Raises:
            ValueError: One is not.
        """
        for key, name in self.model_dump(exclude_none=True).items():
            require_known(f"files_from.{key}", "member", name, [BASE, *members])

    def files(self, pool: Pool) -> Files:
        """What a merge of a pool has in place of the base's files.

        Raises:
            PoolError: The member has no such file, or its tokens have other numbers than the base's.
        """
        whose = {
            key: pool.members[name].checkpoint if name != BASE else pool.base
            for key, name in self.model_dump(exclude_none=True).items()
            if name != BASE or (key == "chat_template" and self.tokenizer != BASE)
        }
        if "tokenizer" in whose and pool.files:
            raise PoolError(
                "files_from.tokenizer: `vocabulary: union` adds tokens to the base's tokenizer, which no member's stands in for"
            )
        return borrowed_files(pool.base, **whose)


def notes_on(pool: Pool) -> tuple[str, ...]:
    """What a user should know of a pool before it is merged: of its weights and tokens, and of its small files."""
    checkpoints = {name: member.checkpoint for name, member in pool.members.items()}
    return (*pool.notes, *notes_on_files(pool.base, checkpoints))
