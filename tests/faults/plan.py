"""Which calls of a phase are made to fail, and how: from what was recorded to a list of rules."""

import random
from collections import Counter
from collections.abc import Iterator

from supervisor import Place, Rule, errors_of

# Places that are left out, beside the calls of calls.EXCLUDED: (thread, call, beginning of what, reason).
LEFT_OUT = (
    ("", "", "system", "the loader's and Python's own files: they say 'not found' whatever is wrong"),
    ("", "lseek", "", "of an open file, for a place that there is: cannot fail"),
    ("", "ioctl", "", "Python's questions about a descriptor that is open"),
    ("", "prctl", "15", "the name of a thread, which is for those who look"),
    ("", "madvise", "23 4", "a thread's end gives its stack back: advice that nobody waits for"),
)


def reason_left_out(place: Place) -> str:
    """Return why nothing fails at a place, '' if something is to."""
    if not errors_of(place):
        return "has no error that is tried"
    for thread, call, what, reason in LEFT_OUT:
        if thread in place.thread and call in ("", place.call) and place.what.startswith(what):
            return reason
    return ""


def rules(recorded: Counter[Place], programs: tuple[str, ...], thorough: bool, seed: int) -> Iterator[Rule]:
    """Yield all rules for a phase.

    Of a thorough phase: each error at the first, the middle and the last call of each place, and lasting from
    the first. Other phases take a second for each rule, and have four times the places: there each place has
    one error, that the seed chooses, and lasting ones begin at the first place of each program and call.
    """
    begun = set()
    for place, count in sorted(recorded.items()):
        if place.program not in programs or reason_left_out(place):
            continue
        errors = errors_of(place)
        if thorough:
            yield from (
                Rule(place, nth, error) for error in errors for nth in sorted({1, (count + 1) // 2, count})
            )
        else:
            dice = random.Random(f"{seed} {place}")
            yield Rule(place, dice.randint(1, count), dice.choice(errors))
        for error in errors:
            if error == "EINTR":  # a call that is always interrupted there is not
                continue
            if thorough or (place.program, place.call, error) not in begun:
                yield Rule(place, 1, error, lasting=True)
            begun.add((place.program, place.call, error))


def sample(all_rules: list[Rule], seed: int) -> list[Rule]:
    """Return the rules in a random order, so that the first few are of all kinds of calls."""
    dice = random.Random(seed)
    by_call: dict[str, list[Rule]] = {}
    for rule in all_rules:
        by_call.setdefault(rule.place.call, []).append(rule)
    for group in by_call.values():
        dice.shuffle(group)
    groups = list(by_call.values())
    dice.shuffle(groups)
    ordered = []
    while groups:
        for group in groups:
            ordered.append(group.pop())
        groups = [group for group in groups if group]
    return ordered
