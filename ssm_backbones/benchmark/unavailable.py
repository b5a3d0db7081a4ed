"""Why something cannot be measured."""


class Unavailable(RuntimeError):
    """This machine lacks what an entry needs; the message says what."""
