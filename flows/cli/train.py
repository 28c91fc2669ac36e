"""`mergequest train`: what the command line says, put into the file's settings."""

from flows.config.campaign_file import Campaign, load_campaign
from flows.config.train_file import TrainFile, load_train_file
from flows.config.yaml_file import load_yaml, validate
from flows.directory.progress import Display
from flows.training.train import train as train_members
from flows.training.train import train_missing
from merging.errors import SettingsError
from merging.io import addresses
from merging.optimization.fine_tuning import TrainingSettings


def train(
    path: str,
    together: str | None,
    out: str | None,
    epochs: int | None,
    learning_rate: float | None,
    seed: int | None,
    display: Display,
) -> list[str]:
    """Fine-tunes what a train file names, or the members of a campaign file that are missing.

    Args:
        path: Either file; one with `members` is a campaign's.
        together: Name of a model trained on all tasks.
        out: Directory of the members, for a train file.
        epochs: Passes over the data; None for the file's.
        learning_rate: Peak rate; None for the file's.
        seed: Of heads and order; None for the file's.
        display: Shows progress.

    Returns:
        What was made, or was there.

    Raises:
        MergequestError: Something is unusable.
    """
    given = load_yaml(path)
    chosen = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
    changes = {key: value for key, value in chosen.items() if value is not None}
    if "members" in given:
        if out is not None:
            raise SettingsError("--out: a campaign's members lie where its file says")
        campaign: Campaign = load_campaign(path, to_be_made=True)
        return train_missing(campaign, _changed(campaign.training, changes), together, display)
    file = load_train_file(given, path)
    settings = file.model_dump(mode="json")
    settings["training"] |= changes
    if out is not None:
        settings["out"] = addresses.absolute(out)
    if together is not None:
        settings["together"] = together
    return train_members(validate(TrainFile, settings, "command line"), display)


def _changed(settings: TrainingSettings, changes: dict[str, float]) -> TrainingSettings:
    """The settings with what the command line says instead."""
    return validate(TrainingSettings, {**settings.model_dump(mode="json"), **changes}, "command line")
