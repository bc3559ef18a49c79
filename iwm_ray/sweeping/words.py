"""A sweep's results in sentences, computed from the figures: they say no more than the figures do."""

import math
from collections.abc import Sequence

from iwm_ray.sweeping.results import (
    FEWEST,
    MRR,
    OUTCOMES,
    Configuration,
    Effect,
    Relation,
    Result,
    axes_of,
    effects,
    named_points,
    relation,
    sound,
)
from iwm_ray.sweeping.space import short_names


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
        *(relation_words(each) for each in relations(groups)),
        *_strongest_axis(groups),
        *_seeds(groups),
    ]


def relations(groups: Sequence[Configuration]) -> list[Relation]:
    """Of MRR with every outcome that any configuration has."""
    measured = [each for each in OUTCOMES if any(not math.isnan(group.mean(each.metric)) for group in groups)]
    return [relation(sound(groups), outcome) for outcome in measured]


def relation_words(found: Relation) -> str:
    """One sentence on one relation."""
    name = found.outcome.words
    if not found.is_known:
        reason = f"needs {FEWEST} configurations and has {found.count}"
        if found.count >= FEWEST:
            reason = "cannot be told: all have the same figure"
        return f"The rank correlation of MRR with {name} {reason}."
    figures = f"{signed(found.value)} (95 % {signed(found.low)} to {signed(found.high)}, n = {found.count})"
    verb = "rises" if found.value > 0 else "falls"
    paper = ""
    if found.outcome.paper is not None:
        paper = f" The paper reports {signed(found.outcome.paper)}"
        if found.is_clear:
            agrees = found.value * found.outcome.paper > 0
            paper += ": the same direction." if agrees else ": the opposite direction."
        else:
            paper += "."
    if found.is_clear:
        return f"As MRR rises, {name} {verb}: rank correlation {figures}.{paper}"
    return f"Whether {name} goes with MRR cannot be told from these configurations: rank correlation {figures}.{paper}"


def signed(value: float) -> str:
    """`+0.93`, `−0.85`"""
    return f"{value:+.2f}".replace("-", "−")


def figure(value: float, ends: tuple[float, float] | None = None, percent: bool = False) -> str:
    """A figure with its interval; empty where it was not measured."""
    if math.isnan(value):
        return ""
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{scale * value:.{digits}f}"
    if ends and not any(math.isnan(end) for end in ends):
        text += f" ({scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f})"
    return text.replace("-", "−")


def _what_there_is(results: Sequence[Result], groups: Sequence[Configuration], waiting: int) -> list[str]:
    finished = sum(result.status == "finished" for result in results)
    seeds = [len(group.results) for group in groups]
    repeated = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    text = f"{len(groups)} configurations with {repeated} seed{'s' if max(seeds) > 1 else ''} each; "
    text += f"{finished} of {len(results) + waiting} trials are finished."
    collapsed = sum(result.health == "collapsed" for result in results)
    if collapsed:
        text += f" {collapsed} have collapsed, and their configurations stand in the table alone."
    return [text]


def _range(groups: Sequence[Configuration]) -> list[str]:
    named = named_points(groups)
    if not named:
        return ["There are too few sound configurations with an MRR to draw a map."]
    low, high = named["invariant"], named["equivariant"]
    text = (
        f"MRR goes from {figure(low.mean(MRR))} ({low.title}) to {figure(high.mean(MRR))} ({high.title}); "
        f"chance is {figure(high.mean('mrr/chance'))}."
    )
    groups = sound(groups)
    above = sum(group.interval(MRR)[0] > group.mean("mrr/chance") for group in groups)
    if not above:
        return [f"{text} No configuration is above chance, so this is no spectrum yet: train longer."]
    text += f" {above} of {len(groups)} configurations lie above chance."
    if high.mean(MRR) < 0.5:
        text += " The equivariant end is not reached: the paper's has 0.79 or more, in banks of 256 views."
    return [text]


def _strongest_axis(groups: Sequence[Configuration]) -> list[str]:
    found = effects(sound(groups), MRR)
    if not found:
        return []
    short = short_names(axes_of(sound(groups)))
    by_axis = {short[each.axis]: effect_words(each) for each in found}
    clear = [each for each in found if each.is_clear]
    if clear:
        lead, (low, high) = clear[0], clear[0].ends
        name = short[lead.axis]
        text = (
            f"{name} {'moves MRR most' if lead is found[0] else 'surely moves MRR'}: from {figure(lead.means[low])} on "
            f"average with {low} to {figure(lead.means[high])} with {high}, by {by_axis.pop(name)}"
        )
    elif found[0].is_known:
        text = "No axis moves MRR by more than seeds differ"
    else:
        text = "Whether an axis moves MRR needs more pairs of trials that differ in it alone"
    text = "; ".join([text, *(f"{name} by {words}" for name, words in by_axis.items())]) + "."
    unfair = [short[each.axis] for each in found if not each.is_fair]
    if unfair:
        text += f" No setting of the other axes has every {' or every '.join(unfair)} yet: they have a part in that."
    return [text]


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
