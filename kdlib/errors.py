"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input, told in a line: what was wrong, where, and what would be right.

    The command line prints it and exits with code 2; a notebook shows it in the failing cell.
    """
