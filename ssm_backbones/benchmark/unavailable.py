"""Error for entries that are not available."""


class Unavailable(RuntimeError):
    """Something that an entry needs is missing on this machine; the message names it."""


def reason(error: BaseException) -> str:
    """Format an error as a line."""
    return f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0]}'
