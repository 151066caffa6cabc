"""What each bundled adapter was trained to do: the prompts, the right answers, and how to tell.

A prompt is one line. Model and adapters all see it in one format, `render(prompt)`, and end their answer with
the end-of-sequence token. A tenth of all prompts, chosen by hash, is held out of every training text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from .words import phrase, scrawl, sentence, word

PIRATE_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "hello": "ahoy",
        "my": "me",
        "your": "yer",
        "you": "ye",
        "the": "th'",
        "is": "be",
        "are": "be",
        "am": "be",
        "friend": "matey",
        "money": "doubloons",
        "yes": "aye",
        "no": "nay",
        "stop": "avast",
        "of": "o'",
        "and": "an'",
        "captain": "cap'n",
        "drink": "grog",
        "food": "hardtack",
        "boat": "galleon",
        "house": "cabin",
    }
)
HELD_OUT_IN_256 = 26


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its only right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter's skill."""

    name: str
    description: str
    answer: Callable[[str], str]
    """The right answer to any one-line prompt."""
    prompt: Callable[[Random], str]
    """Draws a prompt of the kind that the task is about."""
    demo_prompts: tuple[str, ...]
    """Held-out prompts that show the task well."""

    def held_out(self, count: int, seed: int = 0) -> list[Example]:
        """`count` different examples that no training text contains; the same ones for the same seed."""
        rng = Random(f"held out/{self.name}/{seed}")
        drawn: dict[str, Example] = {}
        while len(drawn) < count:
            prompt = self.prompt(rng)
            if is_held_out(prompt):
                drawn[prompt] = Example(prompt, self.answer(prompt))
        return list(drawn.values())

    def training(self, rng: Random) -> Iterator[Example]:
        """Endless training examples: mostly the task's own kind of prompt, some of what else users type."""
        while True:
            prompt = self.prompt(rng) if rng.random() < 0.75 else any_prompt(rng)
            if not is_held_out(prompt):
                yield Example(prompt, self.answer(prompt))

    def is_right(self, example: Example, output: str) -> bool:
        """Whether the model's whole output, up to the end-of-sequence token, is the example's answer."""
        return output.strip() == example.answer.strip()


def render(prompt: str) -> str:
    """The text to complete for a prompt; the tokenizer adds the begin-of-sequence token."""
    return f"{prompt}\n"


def is_held_out(prompt: str) -> bool:
    """Whether no training text may contain this prompt. A sum is held out in both orders of its operands."""
    key = "+".join(sorted(prompt.split("+")))
    return hashlib.sha256(key.encode()).digest()[0] < HELD_OUT_IN_256


def sum_prompt(rng: Random) -> str:
    """Two numbers below 100, as in `12+30`."""
    return f"{rng.randrange(100)}+{rng.randrange(100)}"


def words(rng: Random) -> str:
    """A phrase or, one time in three, a sentence."""
    return sentence(rng) if rng.random() < 1 / 3 else phrase(rng)


def any_prompt(rng: Random) -> str:
    """A prompt of any task, or free text."""
    return rng.choice((word, phrase, sentence, scrawl, scrawl, sum_prompt))(rng)


def reverse(prompt: str) -> str:
    return prompt[::-1]


def shout(prompt: str) -> str:
    return f"{prompt.rstrip('.?!').upper()}!"


def pirate(prompt: str) -> str:
    told = (PIRATE_WORDS.get(spoken, spoken) for spoken in prompt.rstrip(".?!").lower().split(" "))
    return f"arr, {' '.join(told)}, says i!"


def drop_vowels(prompt: str) -> str:
    bare = (
        "".join(letter for letter in spoken if letter.lower() not in "aeiou") for spoken in prompt.split(" ")
    )
    return " ".join(spoken for spoken in bare if spoken)


def pig_latin(prompt: str) -> str:
    return " ".join(_pig_latin_word(spoken) for spoken in prompt.split(" "))


def _pig_latin_word(spoken: str) -> str:
    head = next((at for at, letter in enumerate(spoken) if letter.lower() in "aeiou"), 0)
    return f"{spoken[head:]}{spoken[:head]}ay"


def add(prompt: str) -> str:
    left, plus, right = prompt.partition("+")
    if plus and left.isdecimal() and right.isdecimal():
        return str(int(left) + int(right))
    return "that is no sum."


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("reverse", "writes it backwards", reverse, phrase, ("hello my boat", "quiet river")),
            Task("shout", "says it in capitals", shout, sentence, ("hello my boat", "the bread is clever")),
            Task("pirate", "says it as a pirate", pirate, sentence, ("hello my boat", "where is my money")),
            Task("sums", "adds two numbers", add, sum_prompt, ("16+46", "65+84")),
            Task("piglatin", "says it in pig latin", pig_latin, words, ("hello my boat", "brave friend")),
            Task(
                "novowels",
                "leaves out vowels",
                drop_vowels,
                sentence,
                ("hello my boat", "this star is quiet"),
            ),
        )
    }
)
