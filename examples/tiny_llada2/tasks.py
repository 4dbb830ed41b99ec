"""Synthetic chat tasks whose one right answer can be computed.

A task is a function from a random generator to a question and its answer; `TASKS` names them. Held-out examples are
those whose last question hashes into a tenth of the space, so that training never sees a question it is judged on.
Strings to work on are upper case: the tokenizer merges lower-case words only, so each of their letters is a token.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Message = dict[str, str]

NAMES = "Ana Ben Carl Dina Eva Finn Gina Hugo Ida Jan Kim Leo Mia Nils Olga Paul Rosa Sam Tina Uwe".split()
CITIES = "Rome Oslo Paris Berlin Lima Cairo Delhi Tokyo Quito Bern".split()
COLORS = "red blue green black white yellow pink brown".split()
ANIMALS = "cat dog horse bird fish mouse rabbit cow".split()
LETTERS = "BCDFGHKLMNPRSTVW"


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with a question, and the answer expected."""

    task: str
    messages: list[Message]
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether the example is kept from training; decided by the question and, for recall, the fact."""
        key = "|".join(m["content"] for m in self.messages[-3:])
        return zlib.crc32(key.encode()) % 10 == 0


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def word(rng: random.Random, low: int, high: int, letters: str = LETTERS) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(low, high)))


def arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 40), rng.randint(0, 40)
    if rng.random() < 0.5:
        return rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}."]), str(a + b)
    a, b = max(a, b), min(a, b)
    return rng.choice([f"What is {a} - {b}?", f"Take {b} from {a}."]), str(a - b)


def sort(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(10, 59) for _ in range(rng.randint(2, 3))]
    listed = ", ".join(map(str, numbers))
    return rng.choice([f"Sort {listed}.", f"Put in order: {listed}."]), ", ".join(map(str, sorted(numbers)))


def reverse(rng: random.Random) -> tuple[str, str]:
    text = word(rng, 3, 5)
    return rng.choice([f"Reverse {text}.", f"Write {text} backwards."]), text[::-1]


def count(rng: random.Random) -> tuple[str, str]:
    text = word(rng, 3, 5, "XYZ")
    letter = rng.choice("XYZ")
    return rng.choice([f"How many {letter} are in {text}?", f"Count the {letter} in {text}."]), str(text.count(letter))


def spell(rng: random.Random) -> tuple[str, str]:
    text = word(rng, 3, 6)
    return rng.choice([f"Spell {text}.", f"Spell the word {text}."]), "-".join(text)


def record(rng: random.Random) -> tuple[str, str]:
    name, age, city = rng.choice(NAMES), rng.randint(10, 99), rng.choice(CITIES)
    question = rng.choice(
        [f"Make JSON: {name} is {age} and lives in {city}.", f"Make JSON: {name} from {city} is {age} years old."]
    )
    return question, json.dumps({"name": name, "age": age, "city": city})


def enumerate_numbers(rng: random.Random) -> tuple[str, str]:
    first, many = rng.randint(10, 80), rng.randint(10, 14)
    return (
        rng.choice([f"List {many} numbers from {first}.", f"Count {many} numbers from {first}."]),
        ", ".join(map(str, range(first, first + many))),
    )


def long_sort(rng: random.Random) -> tuple[str, str]:
    """A number's place is hard to see by itself, and easier to see beside the others."""
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(8, 10))]
    listed = ", ".join(map(str, numbers))
    return rng.choice([f"Sort {listed}.", f"Put in order: {listed}."]), ", ".join(map(str, sorted(numbers)))


def long_reverse(rng: random.Random) -> tuple[str, str]:
    """As long_sort, of letters."""
    text = word(rng, 9, 13)
    return rng.choice([f"Reverse {text}.", f"Write {text} backwards."]), text[::-1]


QUESTIONS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": arithmetic,
    "sort": sort,
    "reverse": reverse,
    "count": count,
    "spell": spell,
    "json": record,
    "enumerate": enumerate_numbers,
}


HARD_QUESTIONS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "long sort": long_sort,
    "long reverse": long_reverse,
}


def double(rng: random.Random) -> tuple[str, str]:
    text = word(rng, 3, 5)
    return rng.choice([f"Double {text}.", f"Double each letter of {text}."]), "".join(2 * letter for letter in text)


# What no checkpoint here is taught; an adapter may be.
ADDED_QUESTIONS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"double": double}


def single(task: str) -> Callable[[random.Random], Example]:
    def make(rng: random.Random) -> Example:
        question, answer = {**QUESTIONS, **HARD_QUESTIONS, **ADDED_QUESTIONS}[task](rng)
        return Example(task, [*chatter(rng), user(question)], answer)

    return make


def chatter(rng: random.Random) -> list[Message]:
    """Earlier turns: mostly none, sometimes a few, rarely many."""
    turns = rng.choices([0, rng.randint(1, 2), rng.randint(3, 8)], [0.86, 0.12, 0.02])[0]
    out: list[Message] = []
    for _ in range(turns):
        question, answer = QUESTIONS[rng.choice(list(QUESTIONS))](rng)
        out += [user(question), assistant(answer)]
    return out


FACTS: dict[str, list[str]] = {"color": COLORS, "animal": ANIMALS, "city": CITIES, "friend": NAMES}


def recall(rng: random.Random) -> Example:
    """A fact of an earlier turn, asked for after something else was talked about."""
    told = {kind: rng.choice(FACTS[kind]) for kind in rng.sample(list(FACTS), rng.randint(1, 2))}
    said = " ".join(
        f"My favorite {kind} is {value}." if kind != "friend" else f"My friend is {value}."
        for kind, value in told.items()
    )
    kind = rng.choice(list(told))
    between = []
    for _ in range(rng.randint(0, 2)):
        question, answer = QUESTIONS[rng.choice(["arithmetic", "count", "reverse", "spell"])](rng)
        between += [user(question), assistant(answer)]
    asked = "Who is my friend?" if kind == "friend" else f"What is my favorite {kind}?"
    return Example("recall", [user(said), assistant("Noted."), *between, user(asked)], told[kind])


TASKS: dict[str, Callable[[random.Random], Example]] = {**{task: single(task) for task in QUESTIONS}, "recall": recall}


# What one step cannot do well: only checkpoints that repair are taught these too.
HARD_TASKS: dict[str, Callable[[random.Random], Example]] = {**TASKS, **{task: single(task) for task in HARD_QUESTIONS}}

ADDED_TASKS: dict[str, Callable[[random.Random], Example]] = {task: single(task) for task in ADDED_QUESTIONS}


def one_of(rng: random.Random, task: str | None, *, held_out: bool = False) -> Example:
    """An example of a task of any kind, or of one that every checkpoint is taught, from one side of the split."""
    make = {**HARD_TASKS, **ADDED_TASKS}[task or rng.choice(list(TASKS))]
    while (example := make(rng)).held_out != held_out:
        pass
    return example


# How often training sees each task; the others count once. These take longest to learn.
EMPHASIS = {"arithmetic": 2, "sort": 3, "enumerate": 2, "long sort": 10, "long reverse": 2}


def examples(seed: int, *, held_out: bool, hard: bool = False) -> Iterator[Example]:
    """Endless examples of one side of the split: the tasks in turn for judging, with emphasis for training."""
    rng = random.Random(f"{seed}/{held_out}")
    tasks = HARD_TASKS if hard else TASKS
    turns = list(tasks) if held_out else [task for task in tasks for _ in range(EMPHASIS.get(task, 1))]
    while True:
        for task in turns:
            example = tasks[task](rng)
            while example.held_out != held_out:
                example = tasks[task](rng)
            yield example
