"""Words that several parts need in what they tell a person."""


def counted(count: float, noun: str) -> str:
    """`1 trial`, `2 trials`, `0.5 GPUs`"""
    return f"{count:g} {noun}" + ("" if count == 1 else "s")
