"""Draws calls that show what a program does; runs inside a sandbox, beside a recorder.

A call that runs lines which no earlier one ran is worth varying: half of the calls are an earlier
one with one argument changed. Calls that only fail are kept where they run new lines, for a check
of arguments is a part of what a program does.
"""

MAX_SHARE_OF_FAILURES = 0.25
MAX_SLOW = 2  # calls of one target that do not end in time, after which it is not drawn
MAX_ALIKE = 3  # tests of one target that show the same
ROUNDS = 8  # calls that are drawn for each one that is asked for


class Target:
    """Something that can be called.

    Attributes:
      module: that the call is made in.
      form: text of the call, with {} for each list of arguments.
      lists: for each {}, its parameters: (name, values, whether it may be left out).
      makes: name of the class whose object it gives, "" for none.
      separator: of arguments.
      weight: of its share of the tests.
      kept: number of its tests.
      shown: how many of them show each outcome.
      slow: number of its calls that did not end in time.
    """

    def __init__(self, module, form, *lists, makes="", separator=", ", weight=1):
        self.module = module
        self.form = form
        self.lists = lists
        self.makes = makes
        self.separator = separator
        self.weight = weight
        self.kept = 0
        self.shown = {}
        self.slow = 0

    def text(self, drawn):
        """Return the text of a call with the arguments that were drawn."""
        joined = (self.separator.join(one for one in listed if one) for listed in drawn)
        return self.form.format(*joined)


def draw_arguments(target, rng, objects):
    """Return a list of texts for each of the target's lists; "" stands for one that is left out."""
    return [[draw_one(one, rng, objects) for one in listed] for listed in target.lists]


def draw_one(parameter, rng, objects):
    """Return the text of one argument, "" where it is left out."""
    name, values, may_be_left_out = parameter
    if may_be_left_out and rng.random() < 0.6:
        return ""
    value = rng.choice(objects) if objects and rng.random() < 0.15 else rng.choice(values)
    return f"{name}={value}" if name else value


def vary(target, drawn, rng, objects):
    """Return the arguments of an earlier call, one of them drawn again."""
    drawn = [list(listed) for listed in drawn]
    places = [(i, j) for i, listed in enumerate(target.lists) for j in range(len(listed))]
    if places:
        i, j = rng.choice(places)
        drawn[i][j] = draw_one(target.lists[i][j], rng, objects)
    return drawn


def in_order(drawn):
    """Return arguments with the unnamed ones first, as a call needs them."""
    return [sorted(listed, key=lambda one: is_named(one)) for listed in drawn]


def is_named(text):
    """Return whether the text of an argument names its parameter."""
    name, equals, rest = text.partition("=")
    return bool(equals) and name.isidentifier() and not rest.startswith("=")


def draw_tests(examples, targets, watch, rng, limit):
    """Yield tests: the examples first, then calls that are drawn.

    Args:
      examples: (module, statements) that are tests as they are.
      targets: what can be called.
      watch: from (module, statements) to (outcome or None, {file: lines}); lines are None for what
        does not end in time.
      rng: of the draws.
      limit: of the tests.
    """
    seen = set()
    covered = set()
    kept = failures = 0
    pool = []
    objects = {}
    share = max(8, 4 * limit // max(1, sum(target.weight for target in targets)))

    def attempt(module, statements, target=None):
        if (module, *statements) in seen:
            return None
        seen.add((module, *statements))
        outcome, lines = watch(module, statements)
        if target and lines is None:
            target.slow += 1
        if outcome is None or not lines:
            return None
        places = {(file, line) for file, numbers in lines.items() for line in numbers}
        test = {"module": module, "statements": statements, "outcome": outcome, "lines": lines}
        return test, places - covered, any(one[0] for one in outcome)

    for module, statements in examples:
        found = attempt(module, statements) if kept < limit // 2 else None
        if found and found[2]:
            covered |= found[1]
            kept += 1
            yield found[0]
    for _ in range(ROUNDS * limit if targets else 0):
        if kept >= limit:
            return
        if pool and rng.random() < 0.5:
            target, drawn = rng.choice(pool)
            drawn = vary(target, drawn, rng, objects.get(target.module))
        else:
            target = rng.choice(targets)
            drawn = draw_arguments(target, rng, objects.get(target.module))
        if target.kept >= share * target.weight or target.slow >= MAX_SLOW:
            continue
        text = target.text(in_order(drawn))
        found = attempt(target.module, [text], target)
        if not found:
            continue
        test, new, succeeds = found
        if not succeeds and (not new or failures > MAX_SHARE_OF_FAILURES * limit):
            continue
        shown = str(test["outcome"])
        if not new and target.shown.get(shown, 0) >= MAX_ALIKE:
            continue
        target.shown[shown] = target.shown.get(shown, 0) + 1
        covered |= new
        kept += 1
        failures += not succeeds
        target.kept += 1
        pool += [(target, drawn)] * (4 if new else 1)  # what ran new lines is varied more often
        if succeeds and target.makes and len(text) < 80:
            objects.setdefault(target.module, []).append(text)
        yield test
