"""What ends a run: the sentence that the user reads."""


class VmError(Exception):
    """Something that is needed is not there, or the guest did not do what it was asked; the text says what."""
