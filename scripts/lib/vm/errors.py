"""What ends a run: the sentence that the user reads."""


class VmError(Exception):
    """Something needed is not there, or the guest did not do as asked; the text says what."""
