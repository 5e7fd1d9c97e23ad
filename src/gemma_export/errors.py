"""The errors a user can meet: each says what happened, to what, and what to do next.

The command line prints `message`, then `hint`, and exits with `exit_code`: 2 where the request itself
cannot be carried out as typed, 1 where carrying it out failed. Anything that is not a
`GemmaExportError` is a defect of this project.
"""


class GemmaExportError(Exception):
    """Base of every error that is reported as a sentence and a hint.

    Args:
        message: One sentence: what happened, and to what.
        hint: What to do next.
    """

    exit_code: int = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}"


class UsageError(GemmaExportError):
    """The request cannot be carried out as it was typed."""

    exit_code = 2


class CheckpointError(GemmaExportError):
    """A checkpoint that is missing, damaged, or not a Gemma."""


class GraphError(GemmaExportError):
    """A graph that does not hold what a stage promises; it names the stage."""


class StorageError(GemmaExportError):
    """The disk refused: full, read-only, or changed under a build."""


class BundleError(GemmaExportError):
    """A bundle that is damaged, unsafe, or of another format version."""


class ScalesError(GemmaExportError):
    """A file of scales that is damaged, of another format version, or of another model."""


class CalibrationError(GemmaExportError):
    """Activations of which no scales can be made, or text that shows too few of them."""


class ParityError(GemmaExportError):
    """A bundle that does not say what its reference says, within its precision's budget."""


class EngineError(GemmaExportError):
    """A graph that TensorRT does not compile, or an engine that is not the one that was asked for."""


class DeviceError(GemmaExportError):
    """A device that is missing, too old, out of memory, or that failed."""


class ContextFullError(GemmaExportError):
    """More tokens than the cache has slots; raised before any slot is overwritten."""


class OverwrittenError(GemmaExportError):
    """A rolling cache that is to go on from a position whose window it has overwritten."""


class SavedCacheError(GemmaExportError):
    """A file of a saved cache that is damaged, of another format version, or of another bundle."""


class PromptError(UsageError):
    """A prompt that cannot be read or encoded."""


class MissingDependencyError(GemmaExportError):
    """A package of one of the extras is not installed."""


def first_line(error: Exception) -> str:
    """The first line of what an exception of someone else's says, or its name where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
