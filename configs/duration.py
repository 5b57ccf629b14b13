"""How a span of time is written for a person."""


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front where there are any."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{days}d {text}" if days else text
