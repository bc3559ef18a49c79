"""A sweep's results in sentences, computed from the figures: they say no more than the figures do."""

import math
from collections.abc import Mapping, Sequence

from iwm_ray.sweeping.results import (
    FEWEST,
    GAIN,
    MRR,
    TUNED,
    Configuration,
    Effect,
    Outcome,
    Relation,
    Result,
    axes_of,
    effects,
    measured,
    relation,
    sound,
    span,
)
from iwm_ray.sweeping.space import short_names, short_words
from iwm_ray.wording import counted


def reading(results: Sequence[Result], groups: Sequence[Configuration], waiting: int = 0) -> list[str]:
    """The paragraph of the report, sentence by sentence.

    Args:
        results: of the trials that have begun.
        groups: the same by configuration.
        waiting: trials that are planned and have not begun.
    """
    return [
        *_what_there_is(results, groups, waiting),
        *_range(groups),
        *_on_mrr(groups),
        *_on_outcomes(groups),
        *_related(relations(groups)),
        *_seeds(groups),
    ]


def relations(groups: Sequence[Configuration]) -> list[Relation]:
    """Of MRR with every outcome that any configuration has."""
    return [relation(sound(groups), outcome) for outcome in measured(groups, 1)]


def _related(found: Sequence[Relation]) -> list[str]:
    """A sentence on each relation that is clear, and one on all that are not."""
    few = [f"{each.outcome.words} has {each.count}" for each in found if each.count < FEWEST]
    tied = [each.outcome.words for each in found if each.count >= FEWEST and not each.is_known]
    unclear = [
        f"{each.outcome.words} ({_correlation(each)})"
        for each in found
        if each.is_known and not each.is_clear
    ]
    sentences = [
        f"As MRR rises, {each.outcome.words} {'rises' if each.value > 0 else 'falls'}: rank correlation "
        f"{_correlation(each)}."
        for each in found
        if each.is_clear
    ]
    if unclear:
        sentences.append(f"Whether MRR goes with {_either(unclear)} cannot be told by rank correlation.")
    if tied:
        sentences.append(
            f"The rank correlation of MRR with {_either(tied)} cannot be told: all have the same figure."
        )
    if few:
        sentences.append(f"A rank correlation with MRR needs {FEWEST} configurations; {', '.join(few)}.")
    return sentences


def _correlation(found: Relation) -> str:
    """`+0.17, 95 % −0.40 to +0.66, n = 12; the paper's −0.85`"""
    paper = "" if found.outcome.paper is None else f"; the paper's {signed(found.outcome.paper)}"
    return (
        f"{signed(found.value)}, 95 % {signed(found.low)} to {signed(found.high)}, n = {found.count}{paper}"
    )


def signed(value: float) -> str:
    """`+0.93`, `−0.85`"""
    return f"{value:+.2f}".replace("-", "−")


def figure(value: float, ends: tuple[float, float] | None = None, percent: bool = False) -> str:
    """A figure with its interval; empty where it was not measured. An end that is not 0 is not shown as 0 where one or two
    more digits tell it."""
    if math.isnan(value):
        return ""
    scale, digits = (100, 1) if percent else (1, 3)
    ends = None if ends is None or any(math.isnan(end) for end in ends) else ends
    if ends:
        more = (digits + n for n in range(3) if all(round(scale * end, digits + n) for end in ends))
        digits = next(more, digits)
    text = f"{scale * value:.{digits}f}"
    if ends:
        text += f" ({scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f})"
    return text.replace("-", "−")


def _within(text: str) -> str:
    """A figure with its interval where it stands in brackets itself: `0.045, 0.031 to 0.058`"""
    return text.replace(" (", ", ").removesuffix(")")


def _either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`"""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _what_there_is(results: Sequence[Result], groups: Sequence[Configuration], waiting: int) -> list[str]:
    finished, planned = sum(result.status == "finished" for result in results), len(results) + waiting
    seeds = [len(group.results) for group in groups]
    repeated = counted(max(seeds), "seed")
    if min(seeds) < max(seeds):
        repeated = f"{min(seeds)} to {repeated}"
    text = f"{counted(len(groups), 'configuration')} with {repeated}{' each' if len(groups) > 1 else ''}; "
    text += (
        f"{finished} of {counted(planned, 'trial')} {'is' if 1 in (finished, planned) else 'are'} finished."
    )
    collapsed = sum(result.health == "collapsed" for result in results)
    if collapsed == 1:
        text += " One has collapsed, and its configuration stands in the table alone."
    elif collapsed:
        text += f" {collapsed} have collapsed, and their configurations stand in the table alone."
    return [text]


def _range(groups: Sequence[Configuration]) -> list[str]:
    ends = span(groups)
    if not ends:
        return ["There are too few sound configurations with an MRR to draw a map."]
    low, high = ends
    text = (
        f"MRR goes from {figure(low.mean(MRR))} ({low.title}) to {figure(high.mean(MRR))} ({high.title}); "
        f"chance is {figure(high.mean('mrr/chance'))}."
    )
    groups = sound(groups)
    above = sum(group.is_above_chance for group in groups)
    if not above:
        return [f"{text} No configuration is above chance, so this is no spectrum yet: train longer."]
    text += f" {above} of {len(groups)} configurations {'lies' if above == 1 else 'lie'} above chance."
    if not high.is_above_chance:
        text += " The highest is not among them, its interval being wide, so no end has a name yet."
    elif high.mean(MRR) < 0.5:
        text += " The equivariant end is not reached: the paper's has 0.79 or more, in banks of 256 views."
    return [text]


def _on_mrr(groups: Sequence[Configuration]) -> list[str]:
    """What the axes do to MRR."""
    found = effects(sound(groups), MRR)
    if not found:
        return []
    short = short_names(axes_of(sound(groups)))
    clear = [each for each in found if each.is_clear]
    others = [each for each in found if not each.is_clear]
    told = [f"{short[each.axis]} ({_within(effect_words(each))})" for each in others]
    if clear:
        low, high = (_with(clear[0].axis, end) for end in clear[0].ends)
        first, last = (
            figure(value) for value in (min(clear[0].means.values()), max(clear[0].means.values()))
        )
        sentences = [
            f"MRR is {'moved most' if clear[0] is found[0] else 'surely moved'} by {short[clear[0].axis]}: from {first} on "
            f"average {low} to {last} {high}, by {effect_words(clear[0])}"
            + "".join(f", and by {short[each.axis]}, by {effect_words(each)}" for each in clear[1:])
            + "."
        ]
        if told:
            sentences.append(f"Whether {_either(told)} moves it is not clear.")
    elif any(each.is_known for each in found):
        sentences = [f"No axis moves MRR by more than seeds differ: {', '.join(told)}."]
    else:
        sentences = [f"Whether {_either(told)} moves MRR needs more pairs of trials that differ in it alone."]
    unfair = [short[each.axis] for each in found if not each.is_fair]
    if unfair:
        sentences.append(
            f"No setting of the other axes has every {' or every '.join(unfair)} yet: they have a part in that."
        )
    return [" ".join(sentences)]


def _on_outcomes(groups: Sequence[Configuration]) -> list[str]:
    """What the axes surely do to what the features are good for: what the figure of the effects shows bold."""
    groups = sound(groups)
    shown = measured(groups, min(FEWEST, len(groups)))
    found = {outcome: effects(groups, outcome.metric) for outcome in shown}
    sentences = [
        _on_outcome(outcome, each) for outcome, each in found.items() if any(one.is_clear for one in each)
    ]
    unclear = _unclear_gains(found)
    if unclear:
        sentences.append(
            f"Whether {_either(unclear)} also moves the gain over a random predictor is not clear."
        )
    said = sum(each.is_clear for known in found.values() for each in known) + len(unclear)
    if said < sum(each.is_known for known in found.values() for each in known):
        sentences.append(
            f"No {'other ' if sentences else ''}effect of an axis on what the features are good for is clear."
        )
    return sentences


def _on_outcome(outcome: Outcome, found: Sequence[Effect]) -> str:
    """`The linear probe is higher with paper than with strong, by 3.4 points (2.0 to 4.8).`"""
    parts: list[str] = []
    for each in found:
        if each.is_clear:
            low, high = (_with(each.axis, end) for end in each.ends)
            unit = "" if parts else " points"
            parts.append(f"{high} than {low}, by {effect_words(each, True).replace(' ', f'{unit} ', 1)}")
    *most, last = parts
    listed = f"{', '.join(most)}, and {last}" if most else last
    return f"{outcome.words[0].upper()}{outcome.words[1:]} is higher {listed}."


def _unclear_gains(found: Mapping[Outcome, Sequence[Effect]]) -> list[str]:
    """The axes that surely move the finetuned predictor, while it is not known whether they move its gain over a control
    that has seen the same encoder: they may have moved the encoder alone."""
    gains = {each.axis: each for each in found.get(GAIN, ()) if each.is_known and not each.is_clear}
    tuned = [each for each in found.get(TUNED, ()) if each.is_clear and each.axis in gains]
    short = short_names([each.axis for each in found.get(TUNED, ())])
    return [f"{short[each.axis]} ({_within(effect_words(gains[each.axis], True))} points)" for each in tuned]


def _with(axis: str, value: str) -> str:
    """`with feature`, `with depth 4`"""
    return f"with {short_words({axis: value})}"


def effect_words(effect: Effect, percent: bool = False) -> str:
    """`0.045 (0.031 to 0.058)`"""
    return figure(effect.reach, (effect.low, effect.high), percent)


def _seeds(groups: Sequence[Configuration]) -> list[str]:
    repeated = [group for group in groups if len(group.seeds(MRR)) > 1]
    if not repeated:
        return [
            "With one seed each, what chance does to a configuration is not known: repeat with --seeds 0 1 2."
        ]
    spread = {group.title: max(group.seeds(MRR)) - min(group.seeds(MRR)) for group in repeated}
    widest = max(spread, key=spread.__getitem__)
    return [f"Seeds of one configuration differ by up to {figure(spread[widest])} in MRR ({widest})."]
