"""All that omniopd raises on purpose, named by the boundary that was crossed.

    OmniOPDError
    +-- ConfigError (ValueError)         a setting, a flag or an argument
    +-- DataError (ValueError)           a row, a file, a value of the wrong shape
    +-- MissingExtraError (ImportError)  an optional package is not installed
    +-- TeacherError (RuntimeError)      the teacher, or the way to it
    |   +-- TeacherAuthError             no key, or a key that is refused
    |   +-- TeacherConnectionError       unreachable
    |   +-- TeacherTimeoutError
    |   +-- TeacherRateLimitError
    |   +-- TeacherResponseError         an answer that makes no sense
    |   +-- TeacherCapabilityError       it cannot do what was asked
    |   +-- TeacherBudgetError           the budget of the run is spent
    +-- RolloutError (RuntimeError)      the engine that writes rollouts
    +-- ScoringError (RuntimeError)      similarity
    +-- LearnerError (RuntimeError)
    |   +-- NonFiniteLossError           loss or gradient is not a finite number
    +-- RunError (RuntimeError)          the run folder, a checkpoint, the disk

A message says what happened, the value seen, what was expected and the next step. No message holds a key.
"""

from __future__ import annotations


class OmniOPDError(Exception):
    """Anything omniopd raises on purpose."""


class ConfigError(OmniOPDError, ValueError):
    """A setting, a flag or an argument that cannot be used."""


class DataError(OmniOPDError, ValueError):
    """A row, a file or a value of the wrong shape."""


class MissingExtraError(OmniOPDError, ImportError):
    """An optional package is not installed; the message holds the pip line."""


class TeacherError(OmniOPDError, RuntimeError):
    """The teacher, or the way to it."""


class TeacherAuthError(TeacherError):
    """No key, or a key that is refused. Stops a run at once."""


class TeacherConnectionError(TeacherError):
    """The teacher cannot be reached."""


class TeacherTimeoutError(TeacherError):
    """The teacher took too long."""


class TeacherRateLimitError(TeacherError):
    """The teacher asks us to slow down, or a quota is used up."""


class TeacherResponseError(TeacherError):
    """The teacher's answer makes no sense."""


class TeacherCapabilityError(TeacherError):
    """The teacher cannot do what was asked of it."""


class TeacherBudgetError(TeacherError):
    """The budget of the run is spent."""


class RolloutError(OmniOPDError, RuntimeError):
    """The engine that writes rollouts failed."""


class ScoringError(OmniOPDError, RuntimeError):
    """A similarity could not be computed."""


class LearnerError(OmniOPDError, RuntimeError):
    """The learner cannot go on."""


class NonFiniteLossError(LearnerError):
    """A loss or a gradient is not a finite number; the offending rollouts were saved."""


class RunError(OmniOPDError, RuntimeError):
    """The run folder, a checkpoint or the disk."""
