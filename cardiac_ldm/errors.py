"""The errors a user can act on: each names the file, field or value and says what to do."""


class StudyError(Exception):
    """Base of all errors that the user can mend; in a notebook it prints as one sentence, with no traceback."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for exceptions that render themselves."""
        return [f"{type(self).__name__}: {self}"]


class ParameterError(StudyError):
    """A notebook parameter, profile or setting is wrong."""


class CohortError(StudyError):
    """A manifest or a patient's files can't be used as they are."""


class PrivacyError(StudyError):
    """What was asked for would let something about private patients escape the guarantee."""
