"""Numbers of a board as words with their units, for a terminal: the page's own words."""

NONE = "–"
_BARS = " ▏▎▍▌▋▊▉█"
_SPARKS = "▁▂▃▄▅▆▇█"
_SIZES = ("B", "kB", "MB", "GB", "TB")


def number(value: float | None) -> str:
    if value is None:
        return NONE
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def nbytes(value: float | None) -> str:
    if value is None:
        return NONE
    place = 0
    while value >= 1000 and place < len(_SIZES) - 1:
        value, place = value / 1000, place + 1
    return f"{number(value if place else round(value))} {_SIZES[place]}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"


def seconds(value: float | None) -> str:
    match value:
        case None:
            return NONE
        case _ if value < 1:
            return f"{1000 * value:.0f} ms"
        case _ if value < 100:
            return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
        case _ if value < 3600:
            return f"{value // 60:.0f} min {value % 60:.0f} s"
    return f"{value // 3600:.0f} h {value % 3600 // 60:.0f} min"


def counted(amount: int, one: str) -> str:
    return f"{amount:,} {one}{'' if amount == 1 else 's'}"


def bar(share: float, width: int) -> str:
    """As full as the share, to an eighth of a character."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BARS[rest] if rest else "")).ljust(width, "░")


def spark(values: list[float | None], width: int) -> str:
    """The last values as a line of bars, each as many of them as it takes; spaces where there are none."""
    if not values:
        return ""
    each = max(1, -(-len(values) // width))
    means = [_mean(values[place : place + each]) for place in range(0, len(values), each)]
    most = max((mean for mean in means if mean is not None), default=0.0) or 1.0
    return "".join(" " if mean is None else _SPARKS[min(7, int(8 * mean / most))] for mean in means)


def _mean(values: list[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return sum(told) / len(told) if told else None
