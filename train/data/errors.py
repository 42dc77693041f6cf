"""What can be wrong with data, a whole source or one row of it, and how it is put in one line."""


class DataError(ValueError):
    """The user's data is at fault; launch scripts print the message and exit with 4."""


class RowError(ValueError):
    """One row is of no use; the message is the reason, short and printable."""


class MissingColumn(RowError):
    """The row has no such column. When no row of a source has it, the source is at fault: see
    tokens.check_rows.
    """

    @property
    def column(self) -> str:
        return self.args[0]

    def __str__(self) -> str:
        return f"no column {self.column!r}"


def one_line(error: BaseException) -> str:
    """What an error says, in at most 300 characters that a terminal shows as they are: it may quote
    the data.
    """
    text = " ".join(str(error).split())[:300]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listed(names) -> str:
    """Names in quotation marks, the first 20 of them."""
    names = list(names)
    shown = ", ".join(repr(name)[:60] for name in names[:20])
    return (shown + (", ..." if len(names) > 20 else "")) or "none"
