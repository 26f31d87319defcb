"""Write the demo's training and evaluation files: plain-English requests and their INGOT formulas.

INGOT is a small formula language over named measurement series; ``data/README.md`` describes it.
One table, ``FUNCTIONS``, holds each function's arguments and its English phrasings, so a request and
its formula are always drawn together and cannot disagree.

    python scripts/make_demo_data.py --seed 7 --out data

The output depends on the seed alone: two runs write byte-identical files.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

# --------------------------------------------------------------------------- the language

SERIES = (
    "feed rate", "kiln temp", "flue temp", "steam flow", "pump load", "mill power", "tank level",
    "acid flow", "ore grade", "water flow", "gas pressure", "slag depth", "belt speed", "fan current",
    "dust count", "air flow", "oil temp", "press force", "salt content", "melt yield", "brine density",
    "lab moisture", "coke mass", "furnace draft",
)  # fmt: skip
NEW_SERIES = ("crane tilt", "vent noise", "cell voltage", "sand grade", "roller gap", "lime dose")
"""Series that only the adversarial set mentions."""

UNITS = {
    "m": ("minute", (5, 10, 15, 20, 30, 45, 90)),
    "h": ("hour", (1, 2, 3, 4, 6, 8, 12, 18, 36)),
    "d": ("day", (1, 2, 3, 4, 5, 7, 10, 14, 21, 30)),
    "w": ("week", (1, 2, 3, 4, 5, 6, 8)),
}
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 8: "eight", 10: "ten"}

KEYWORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "stat": {
        "MEAN": ("mean", "average"),
        "SUM": ("sum", "total"),
        "TOP": ("maximum", "peak"),
        "LOW": ("minimum", "low"),
    },
    "side": {"BACK": ("trailing",), "AHEAD": ("leading",), "ROUND": ("centred",)},
    "way": {"BACK": ("back",), "AHEAD": ("ahead", "forward")},
    "bound": {"PIN": ("pinning", "clipping"), "DROP": ("dropping", "removing")},
    "zero": {"GAP": ("a gap",), "NIL": ("nil",)},
    "cmp": {"OVER": ("over", "above"), "UNDER": ("under", "below")},
    "fill": {"HOLD": ("last value",), "NEXT": ("next value",), "LINE": ("straight line",)},
    "form": {"ABS": ("absolute",), "PCT": ("percent",)},
}
"""Kind of keyword -> keyword -> the words that stand for it in a request."""

NEW_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "stat": {
        "MEAN": ("typical value",),
        "SUM": ("added-up amount",),
        "TOP": ("largest reading",),
        "LOW": ("smallest reading",),
    },
    "side": {"BACK": ("before it",), "AHEAD": ("after it",), "ROUND": ("on both sides of it",)},
    "way": {"BACK": ("earlier",), "AHEAD": ("later",)},
    "bound": {"PIN": ("moved to the nearest limit",), "DROP": ("thrown away",)},
    "zero": {"GAP": ("nothing",), "NIL": ("a 0",)},
    "cmp": {"OVER": ("higher than",), "UNDER": ("lower than",)},
    "fill": {
        "HOLD": ("repeating what came before",),
        "NEXT": ("copying what comes after",),
        "LINE": ("interpolating",),
    },
    "form": {"ABS": ("in plain units",), "PCT": ("relative to where it began",)},
}
"""The same keywords in words that only the adversarial set uses."""


@dataclass(frozen=True)
class Function:
    """One INGOT function: its arguments, name -> kind in formula order, and its English phrasings.

    A phrasing names arguments in braces. ``{value}`` is the argument that may be another formula;
    ``{x_adj}`` writes a span as an adjective ("7-day"), ``{x_key}`` a keyword in lower case, and
    ``{rest}`` what a percentage leaves of 100. ``nouns`` put every qualifier in front of the value, so
    that one noun phrase can stand inside another without doubt about what belongs to what.
    """

    args: dict[str, str]
    commands: tuple[str, ...]
    nouns: tuple[str, ...] = ()
    new_commands: tuple[str, ...] = ()  # the adversarial set's paraphrases


FUNCTIONS: dict[str, Function] = {
    "SWEEP": Function(
        {"value": "value", "span": "span", "stat": "stat", "side": "side"},
        ("take the {side} {span_adj} {stat} of {value}", "compute the {span_adj} {side} {stat} of {value}"),
        ("the {side} {span_adj} {stat} of {value}", "the {span_adj} {side} {stat} of {value}"),
        (
            "summarise {value} at each moment by the {stat} in the {span} {side}",
            "run a window of {span} over {value} and keep, for each point, the {stat} {side}",
        ),
    ),
    "SLIDE": Function(
        {"value": "value", "span": "span", "way": "way"},
        ("shift {value} {way} by {span}", "move {value} {span} {way}", "slide {value} {way} {span}"),
        ("the {span_adj} {way} shift of {value}",),
        (
            "plot {value} as if it had happened {span} {way}",
            "re-date {value} so that every reading lands {span} {way}",
        ),
    ),
    "FENCE": Function(
        {"value": "value", "low": "low", "high": "high", "bound": "bound"},
        (
            "keep {value} between {low} and {high}, {bound} outliers",
            "limit {value} to {low} through {high}, {bound} outliers",
        ),
        ("the {low} to {high} {bound} range of {value}",),
        (
            "let {value} go no higher than {high} and no lower than {low}, the rest being {bound}",
            "have every reading of {value} outside {low} and {high} {bound}",
        ),
    ),
    "SHARE": Function(
        {"value": "value", "base": "series", "zero": "zero"},
        (
            "divide {value} by {base}, with {zero} at zero",
            "take the ratio of {value} to {base}, with {zero} at zero",
        ),
        ("the {zero_key}-safe ratio of {value} to {base}",),
        (
            "find how much {value} there is per unit of {base}, writing {zero} when that is empty",
            "form a quotient with {base} below and {value} on top, showing {zero} for x/0",
        ),
    ),
    "PICK": Function(
        {"test": "series", "cmp": "cmp", "level": "level", "value": "value", "other": "series"},
        (
            "use {value} when {test} is {cmp} {level}, otherwise {other}",
            "pick {value} while {test} is {cmp} {level}, else {other}",
        ),
        (),
        (
            "start from {other} but swap in {value} whenever {test} is {cmp} {level}",
            "fall back on {other}, except that {test} {cmp} {level} calls for {value}",
        ),
    ),
    "FLAG": Function(
        {"value": "value", "cmp": "cmp", "level": "level", "span": "span"},
        (
            "flag when {value} stays {cmp} {level} for {span}",
            "raise a flag if {value} is {cmp} {level} for {span}",
        ),
        (),
        (
            "warn once {span} have gone by with {value} {cmp} {level}",
            "mark any stretch of {span} in which {value} was {cmp} {level}",
        ),
    ),
    "GRID": Function(
        {"value": "value", "span": "span", "stat": "stat"},
        (
            "resample {value} every {span} by {stat}",
            "put {value} on steps of {span} by {stat}",
        ),
        ("the {span_adj} grid {stat} of {value}",),
        (
            "cut {value} into blocks of {span} and report each block's {stat}",
            "give one number per {span} for {value}, namely the {stat}",
        ),
    ),
    "MEND": Function(
        {"value": "value", "fill": "fill", "span": "span"},
        (
            "fill gaps in {value} by {fill} up to {span}",
            "mend {value} by {fill} for gaps up to {span}",
        ),
        ("the {span_adj} {fill} fill of {value}",),
        (
            "patch holes of at most {span} in {value}, {fill}",
            "repair {value} where it went missing for {span} or less, {fill}",
        ),
    ),
    "ALLOY": Function(
        {"value": "value", "other": "series", "percent": "percent"},
        (
            "blend {percent} percent of {value} with {other}",
            "mix {percent} percent of {value} into {other}",
        ),
        ("the {percent} percent blend of {value} with {other}",),
        (
            "weigh {value} at {percent} percent and let {other} supply the rest",
            "combine {value} and {other} so that the latter counts for {rest} percent",
        ),
    ),
    "DRIFT": Function(
        {"value": "value", "form": "form", "span": "span"},
        (
            "get the {form} change over {span} in {value}",
            "find the {form} change across {span} in {value}",
        ),
        ("the {span_adj} {form} change in {value}",),
        (
            "tell how far {value} has moved since {span} before, {form}",
            "compare {value} with itself {span} ago, {form}",
        ),
    ),
}

NEW_PAIRS = frozenset(
    {
        ("SWEEP", "SHARE"), ("SLIDE", "FENCE"), ("FENCE", "ALLOY"), ("SHARE", "GRID"), ("PICK", "MEND"),
        ("FLAG", "DRIFT"), ("GRID", "SLIDE"), ("MEND", "SWEEP"), ("ALLOY", "MEND"), ("DRIFT", "SWEEP"),
        ("FLAG", "SHARE"), ("SHARE", "SLIDE"),
    }
)  # fmt: skip
"""(outer, inner) pairs that are nested in no training, test or dev row."""


# --------------------------------------------------------------------------- reading formulas


@dataclass(frozen=True)
class Call:
    """A parsed formula: a function and its arguments, each a word or another call."""

    name: str
    args: tuple[str | Call, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.args))})"

    @property
    def depth(self) -> int:
        """How many calls lie inside each other."""
        return 1 + max((arg.depth for arg in self.args if isinstance(arg, Call)), default=0)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every (outer, inner) pair of nested function names."""
        for arg in self.args:
            if isinstance(arg, Call):
                yield self.name, arg.name
                yield from arg.pairs()


SPAN = re.compile(r"[1-9]\d*[mhdw]")
NUMBER = re.compile(r"(0|[1-9]\d*)(\.\d*[1-9])?")
NAME = re.compile(r"[a-z]+(_[a-z]+)*")


def parse(formula: str) -> Call:
    """Parse one formula in canonical form; ValueError says what is wrong with it."""
    tokens = re.findall(r"[\w.]+|\S", formula)
    call = _parse_value(tokens)
    if tokens or not isinstance(call, Call):
        raise ValueError(f"not a single call: {formula!r}")
    if str(call) != formula:
        raise ValueError(f"not in canonical form: {formula!r}")
    return call


def _parse_value(tokens: list[str]) -> str | Call:
    """Take one word or one call off the front of the tokens."""
    if not tokens:
        raise ValueError("the formula ends too early")
    name = tokens.pop(0)
    if tokens[:1] != ["("]:
        return name
    args = []
    while tokens and tokens.pop(0) in "(,":
        args.append(_parse_value(tokens))
        if tokens[:1] == [")"]:
            tokens.pop(0)
            return _checked(Call(name, tuple(args)))
    raise ValueError(f"{name}: unclosed or badly separated arguments")


def _checked(call: Call) -> Call:
    """Return the call if its arguments fit its function's kinds."""
    if call.name not in FUNCTIONS:
        raise ValueError(f"no function {call.name}")
    kinds = FUNCTIONS[call.name].args
    if len(call.args) != len(kinds):
        raise ValueError(f"{call.name} takes {len(kinds)} arguments, not {len(call.args)}")
    for (name, kind), arg in zip(kinds.items(), call.args, strict=True):
        if not (kind == "value" if isinstance(arg, Call) else _fits(kind, arg)):
            raise ValueError(f"{call.name}: {arg} is no {name}")
    given = dict(zip(kinds, call.args, strict=True))
    if "low" in given and float(str(given["low"])) >= float(str(given["high"])):
        raise ValueError(f"{call.name}: low must be below high")
    return call


def _fits(kind: str, word: str) -> bool:
    """Whether a word can be an argument of this kind."""
    if kind in KEYWORDS:
        return word in KEYWORDS[kind]
    if kind == "percent":
        return bool(NUMBER.fullmatch(word)) and 0 < float(word) < 100
    pattern = {"value": NAME, "series": NAME, "span": SPAN}.get(kind, NUMBER)
    return bool(pattern.fullmatch(word))


# --------------------------------------------------------------------------- drawing rows


@dataclass(frozen=True)
class Phrase:
    """Some English and the piece of formula it stands for."""

    english: str
    formula: str


@dataclass
class Drafter:
    """Draws requests. With ``new`` it uses the adversarial set's words, series and paraphrases."""

    rng: Random
    new: bool = False
    spelled: bool = False  # small numbers of a span as words
    used: list[str] = field(default_factory=list)

    def series(self) -> Phrase:
        """A series that this request does not name yet."""
        pool = SERIES + NEW_SERIES * 2 if self.new else SERIES
        name = self.rng.choice([name for name in pool if name not in self.used])
        self.used.append(name)
        return Phrase(name, name.replace(" ", "_"))

    def number(self) -> str:
        """A level: mostly a whole number."""
        if self.rng.random() < 0.15:
            return f"{self.rng.randrange(10)}.{self.rng.randrange(1, 10)}"
        return str(self.rng.choice((self.rng.randrange(2, 100), self.rng.randrange(100, 1000, 10))))

    def _argument(self, name: str, kind: str, slots: dict[str, str]) -> str:
        """Draw one argument: put its English into the slots and return its formula."""
        if kind == "series":
            series = self.series()
            slots[name] = series.english
            return series.formula
        if kind == "span":
            return self._span(name, slots)
        if kind in KEYWORDS:
            words = (NEW_WORDS if self.new else KEYWORDS)[kind]
            key = self.rng.choice(list(words))
            slots[name], slots[f"{name}_key"] = self.rng.choice(words[key]), key.lower()
            return key
        if kind == "percent":
            slots[name] = str(self.rng.randrange(5, 100, 5))
            slots["rest"] = str(100 - int(slots[name]))
        elif kind == "low":
            slots[name] = str(self.rng.randrange(0, 60))
        elif kind == "high":
            slots[name] = str(int(slots["low"]) + self.rng.randrange(5, 300, 5))
        else:
            slots[name] = self.number()
        return slots[name]

    def _span(self, name: str, slots: dict[str, str]) -> str:
        """Draw a length of time, e.g. "7 days" or "7-day" for ``7d``."""
        unit = self.rng.choice("mhhhdddw")
        word, counts = UNITS[unit]
        count = self.rng.choice(counts)
        number = NUMBER_WORDS.get(count, str(count)) if self.spelled else str(count)
        slots[name] = f"{number} {word}{'s' * (count > 1)}"
        slots[f"{name}_adj"] = f"{number}-{word}"
        return f"{count}{unit}"

    def apply(self, name: str, value: Phrase | None = None, noun: bool = False) -> Phrase:
        """Draw one call of a function, of a fresh series or of what ``value`` says."""
        function = FUNCTIONS[name]
        value = value or self.series()
        slots, args = {"value": value.english}, []
        for arg, kind in function.args.items():
            args.append(value.formula if kind == "value" else self._argument(arg, kind, slots))
        commands = function.new_commands if self.new else function.commands
        template = self.rng.choice(function.nouns if noun else commands)
        return Phrase(template.format(**slots), f"{name}({', '.join(args)})")

    def chain(self, names: tuple[str, ...], nested: bool, noun: bool = False) -> Phrase:
        """Draw a composition, innermost function first: noun phrases inside each other, or steps."""
        phrase = self.apply(names[0], noun=noun or (nested and len(names) > 1))
        for i, name in enumerate(names[1:], start=2):
            if nested:
                phrase = self.apply(name, phrase, noun=i < len(names) or noun)
            else:
                step = self.apply(name, Phrase(self.rng.choice(("it", "the result")), phrase.formula))
                phrase = Phrase(f"{phrase.english}, then {step.english}", step.formula)
        return phrase


COMMAND_FORMS = ("{}.", "{}.", "{}.", "Please {}.", "Can you {}?", "I want to {}.")
NOUN_FORMS = ("Give me {}.", "I need {}.", "Show {}.")


def sentence(rng: Random, phrase: Phrase, noun: bool = False) -> Phrase:
    """Make a request of a command or of a noun phrase."""
    text = rng.choice(NOUN_FORMS if noun else COMMAND_FORMS).format(phrase.english)
    return Phrase(text[0].upper() + text[1:], phrase.formula)


def with_nouns(names: tuple[str, ...]) -> bool:
    """Whether each of these functions has a noun phrase."""
    return all(FUNCTIONS[name].nouns for name in names)


def known_chains() -> list[tuple[str, ...]]:
    """The (inner, outer) compositions that training, test and dev draw from."""
    return [(b, a) for a in FUNCTIONS for b in FUNCTIONS if a != b and (a, b) not in NEW_PAIRS]


def plain(rng: Random, i: int) -> Phrase:
    """A request as in training: one function for even ``i``, two for odd."""
    drafter = Drafter(rng)
    names: tuple[str, ...] = (list(FUNCTIONS)[i // 2 % len(FUNCTIONS)],)
    if i % 2:
        names = rng.choice([chain for chain in known_chains() if chain[-1] == names[0]])
    noun = with_nouns(names) and rng.random() < 0.3
    nested = noun or (with_nouns(names[:-1]) and rng.random() < 0.5)
    return sentence(rng, drafter.chain(names, nested, noun), noun)


def follow_up(rng: Random, i: int) -> list[Phrase]:
    """A conversation: a request of one function, then a change to it."""
    drafter = Drafter(rng, spelled=rng.random() < 0.5)
    series = drafter.series()
    if i % 3:
        inner, outer = rng.choice(known_chains())
        first = drafter.apply(inner, series)
        step = drafter.apply(outer, Phrase("that", first.formula))
        second = Phrase(f"Now {step.english}.", step.formula)
    else:  # only where one series is named is it plain which one to replace
        alone = [name for name, function in FUNCTIONS.items() if "series" not in function.args.values()]
        first = drafter.apply(rng.choice(alone), series)
        other = drafter.series()
        text = rng.choice(("Same for {}.", "Now do the same for {}."))
        second = Phrase(text.format(other.english), first.formula.replace(series.formula, other.formula))
    return [sentence(rng, first), second]


DISTRACTORS = (
    "The {name} read {number} this morning, but leave it out. {text}",
    "{text} Never mind {name}, which we stopped logging {number} weeks ago.",
    "Ticket {number} asked about {name}; this one does not. {text}",
    "{text} (Not {name}, and not the {number} we used last time.)",
)


def adversarial(rng: Random, i: int) -> Phrase:
    """By ``i``: a paraphrase, a distractor, an unseen pair of functions, or three functions."""
    functions, kind = list(FUNCTIONS), i % 4
    if kind == 0:
        drafter = Drafter(rng, new=True, spelled=rng.random() < 0.5)
        return sentence(rng, drafter.apply(functions[i // 4 % len(functions)]))
    drafter = Drafter(rng)
    if kind == 1:
        request = sentence(rng, drafter.apply(functions[i // 4 % len(functions)]))
        text = rng.choice(DISTRACTORS)
        name, number = drafter.series().english, rng.randrange(2, 60)
        return Phrase(text.format(text=request.english, name=name, number=number), request.formula)
    if kind == 2:
        outer, inner = sorted(NEW_PAIRS)[i // 4 % len(NEW_PAIRS)]
        names: tuple[str, ...] = (inner, outer)
    else:
        first, second = rng.choice(known_chains())
        names = (first, second, rng.choice([b for a, b in known_chains() if a == second and b != first]))
    nested = with_nouns(names[:-1]) and rng.random() < 0.5
    return sentence(rng, drafter.chain(names, nested))


# --------------------------------------------------------------------------- writing files

COUNTS = {
    "eval/test.jsonl": 100,
    "eval/dev.jsonl": 60,
    "eval/adversarial.jsonl": 60,
    "formats/messages.jsonl": 20,
    "formats/prompt_completion.jsonl": 40,
    "formats/instruction.jsonl": 40,
    "ingot.jsonl": 640,
}
"""Rows of each file, in the order in which they are drawn."""
SYSTEM = "You write INGOT formulas. Answer with one formula and nothing else."

Row = dict[str, Any]


def folded(text: str) -> str:
    """Text as the overlap check compares it: lower case, runs of white space as one space."""
    return " ".join(text.lower().split())


@dataclass
class Deck:
    """Draws rows, none of which repeats a request or a formula of any row before it."""

    seed: int
    seen: set[str] = field(default_factory=set)

    def draw(self, name: str, count: int, make: Callable[[Random, int], list[Phrase]]) -> list[list[Phrase]]:
        """Draw ``count`` rows with ``make``; each file has its own stream of random numbers."""
        rng = Random(f"{self.seed}:{name}")
        rows: list[list[Phrase]] = []
        while len(rows) < count:
            turns = make(rng, len(rows))
            # A follow-up such as "Same for flue temp." says nothing alone: its whole conversation counts.
            asked = [folded(" / ".join(turn.english for turn in turns[: i + 1])) for i in range(len(turns))]
            new = {*asked, *(turn.formula for turn in turns)}
            if self.seen.isdisjoint(new):
                self.seen |= new
                rows.append(turns)
        for turn in (turn for turns in rows for turn in turns):
            parse(turn.formula)
        return rows


def messages_row(turns: list[Phrase], system: str | None = None) -> Row:
    """A conversation in messages format."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.english})
        messages.append({"role": "assistant", "content": turn.formula})
    return {"messages": messages}


def about_input(rng: Random, i: int) -> list[Phrase]:
    """A request of one function that leaves naming its series to the row's input."""
    drafter, name = Drafter(rng), list(FUNCTIONS)[i % len(FUNCTIONS)]
    return [sentence(rng, drafter.apply(name, Phrase("the series", drafter.series().formula)))]


def input_of(turn: Phrase) -> str:
    """The ``input`` of a request that ``about_input`` drew."""
    call = parse(turn.formula)
    value = call.args[list(FUNCTIONS[call.name].args).index("value")]
    return f"series: {str(value).replace('_', ' ')}"


def draw_pairs(deck: Deck, name: str) -> list[Row]:
    """The rows of a file in prompt and completion format."""
    make = adversarial if "adversarial" in name else plain
    rows = deck.draw(name, COUNTS[name], lambda rng, i: [make(rng, i)])
    return [{"prompt": turn.english, "completion": turn.formula} for (turn,) in rows]


def draw_messages(deck: Deck, name: str, conversations: int, systems: bool) -> list[Row]:
    """The rows of a file in messages format, shuffled; with ``systems``, half have a system message."""
    rows = deck.draw(name, COUNTS[name] - conversations, lambda rng, i: [plain(rng, i)])
    rows += deck.draw(f"{name} conversations", conversations, follow_up)
    Random(f"{deck.seed}:{name} order").shuffle(rows)
    return [messages_row(turns, SYSTEM if systems and i % 2 else None) for i, turns in enumerate(rows)]


def draw_instructions(deck: Deck, name: str) -> list[Row]:
    """The rows of a file in instruction format; every other one names its series in its input."""
    half = COUNTS[name] // 2
    whole = deck.draw(name, half, lambda rng, i: [plain(rng, i)])
    about = deck.draw(f"{name} input", half, about_input)
    rows = []
    for (turn,), (other,) in zip(whole, about, strict=True):
        rows.append({"instruction": turn.english, "input": "", "output": turn.formula})
        rows.append({"instruction": other.english, "input": input_of(other), "output": other.formula})
    return rows


def build(seed: int) -> dict[str, list[Row]]:
    """Draw the rows of every file."""
    deck, files = Deck(seed), {}
    for name in COUNTS:
        if name == "formats/instruction.jsonl":
            files[name] = draw_instructions(deck, name)
        elif name == "formats/messages.jsonl":
            files[name] = draw_messages(deck, name, conversations=10, systems=True)
        elif name == "ingot.jsonl":
            files[name] = draw_messages(deck, name, conversations=40, systems=False)
        else:
            files[name] = draw_pairs(deck, name)
    return files


def in_other_shapes(files: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows of the example files again, in the shapes that other people's data has."""
    talks, pairs = files["formats/messages.jsonl"], files["formats/prompt_completion.jsonl"]
    return {
        "formats/conversations.jsonl": [shared(row) if i % 2 else paired(row) for i, row in enumerate(talks)],
        "formats/questions.csv": [{"question": row["prompt"], "formula": row["completion"]} for row in pairs],
        "formats/text.jsonl": [{"text": f"{row['prompt']} In INGOT: {row['completion']}"} for row in pairs],
        "formats/classification.jsonl": [labelled(row["prompt"], row["completion"]) for row in pairs],
        "labels/train.jsonl": [
            labelled(*(turn["content"] for turn in row["messages"]))
            for row in files["ingot.jsonl"]
            if len(row["messages"]) == 2
        ],
        **{
            f"labels/{name}": [labelled(row["prompt"], row["completion"]) for row in files[name]]
            for name in files
            if name.startswith("eval/")
        },
    }


def labelled(request: str, formula: str) -> Row:
    """A request with the outermost function of its formula as its label."""
    return {"text": request, "label": formula.partition("(")[0]}


def shared(row: Row) -> Row:
    """A row in messages format as ShareGPT has it."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]]}


def paired(row: Row) -> Row:
    """A row in messages format as pairs of input and output."""
    turns = [turn["content"] for turn in row["messages"] if turn["role"] != "system"]
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return {"conversations": [{"input": asked, "output": answered} for asked, answered in pairs]}


def write(files: dict[str, list[Row]], out: Path) -> None:
    """Write each file below ``out``, as a table where its name ends in .csv, else as JSON Lines."""
    for name, rows in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
        else:
            path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def hashes(files: list[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_owner(folder: Path, trained: Path) -> None:
    """Record in an evaluation folder the training file that it belongs to: others do not get it by default."""
    record = {"training_files": hashes([trained]), "files": hashes(sorted(folder.glob("*.jsonl")))}
    (folder / "belongs_to.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write the files and say how many rows each holds."""
    parser = argparse.ArgumentParser(description="Write the demo's INGOT training and evaluation files.")
    parser.add_argument("--seed", type=int, default=7, help="seed of every draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    files = build(args.seed)
    files |= in_other_shapes(files)
    write(files, args.out)
    for folder, trained in {"eval": "ingot.jsonl", "labels/eval": "labels/train.jsonl"}.items():
        write_owner(args.out / folder, args.out / trained)
    for name, rows in files.items():
        print(f"{args.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
