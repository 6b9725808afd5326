"""What a person can get wrong, as opposed to what the program gets wrong."""


class InputError(ValueError):
    """A setting, a file or a table that cannot be used.

    The message is one line that names the value, the limit and the way out. The entry points print it
    alone, without a traceback, and exit with status 1.
    """
