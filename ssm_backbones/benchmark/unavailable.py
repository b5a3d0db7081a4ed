"""Why something is not measured."""


class Unavailable(RuntimeError):
    """This machine lacks what an entry needs; the message says what."""


def reason(error: BaseException) -> str:
    """An error in a line."""
    return f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0]}'
