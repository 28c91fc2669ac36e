"""Errors that a user can do something about: each message names the culprit and the remedy."""


class MergequestError(Exception):
    """Base of every error raised for bad input; the command line prints it without a traceback, exit code 2."""


class SettingsError(MergequestError):
    """A campaign file, recipe file or option is wrong."""


class StorageError(MergequestError):
    """A file or directory cannot be read or written."""


class CheckpointError(MergequestError):
    """A checkpoint is missing, damaged, unsafe or holds unusable weights."""


class PoolError(MergequestError):
    """Base and members do not fit together."""


class TaskError(MergequestError):
    """A task's data, labels, metric or evaluator are unusable."""


class StatisticsError(MergequestError):
    """A statistic is missing, damaged, or belongs to another checkpoint."""


class MethodError(MergequestError):
    """A method cannot merge what it is given (unknown parameter, cancelling scaling factors, …)."""


class SelectionError(MergequestError):
    """No subset of members can be selected as asked."""


class LedgerError(MergequestError):
    """A ledger cannot be read, or belongs to another campaign."""


class SearchError(MergequestError):
    """A search cannot go on: every baseline fails, or one candidate after another with the same error."""


class EngineError(MergequestError):
    """An inference engine is not installed, does not serve the model, or answers otherwise than the model does."""


class EngineLostError(EngineError):
    """An inference engine has died: its evaluator is of no more use, whatever it was measuring."""


class ClusterError(MergequestError):
    """The Ray cluster cannot be reached, or cannot hold what is asked of it."""
