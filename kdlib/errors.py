"""The one exception that means: the user can mend this."""

LONGEST = 500  # letters of a message


class UserError(Exception):
    """Bad input, told in a line: what was wrong, where, and what would be right.

    The command line prints it and exits with code 2; a notebook shows it in the failing cell. A message may quote
    anything that a file holds: what has no place in a line (its ends, control characters, marks that turn the direction
    of writing, halves of characters) becomes an escape, and the middle of what is too long three dots.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST:
            message = _ends(message)
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line if len(line) <= LONGEST else _ends(line))


def _ends(text: str) -> str:
    return f"{text[:300]} ... {text[-(LONGEST - 305) :]}"
