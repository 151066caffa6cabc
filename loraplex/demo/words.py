"""The words and phrases that the demo's prompts are made of, drawn from the caller's generator."""

from __future__ import annotations

import string
from random import Random

GREETINGS = ("hello", "good morning", "good evening", "yes", "no", "listen", "look", "stop")
OWNERS = ("my", "your", "the", "our", "this", "that", "her", "his")
NOUNS = (
    "friend", "boat", "ship", "money", "captain", "house", "garden", "teacher", "river", "mountain",
    "window", "lantern", "kettle", "bread", "letter", "pencil", "market", "bridge", "village", "doctor",
    "sister", "brother", "dog", "cat", "horse", "island", "drink", "food", "song", "story",
    "map", "flag", "storm", "sea", "wind", "star", "clock", "basket", "candle", "orchard",
)  # fmt: skip
QUALITIES = (
    "old", "new", "small", "great", "quiet", "golden", "broken", "happy", "hungry", "lost",
    "warm", "cold", "green", "silver", "simple", "clever", "slow", "bright", "empty", "brave",
)  # fmt: skip
ACTIONS = (
    "sleeping",
    "waiting",
    "singing",
    "working",
    "sailing",
    "dancing",
    "running",
    "resting",
    "hiding",
    "fishing",
)
PLACES = (
    "in the kitchen", "by the river", "on the hill", "near the bridge", "under the table",
    "at the market", "behind the house", "in the harbour", "beyond the sea", "over the water",
)  # fmt: skip
STARTS = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z",
    "br", "ch", "cl", "dr", "fl", "gr", "pl", "qu", "sh", "sl", "st", "th", "tr", "",
)  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo", "y")
ENDS = ("", "", "", "n", "r", "s", "t", "l", "m", "ck", "nd", "sh", "x", "p")


def word(rng: Random) -> str:
    """A lower-case word of 2 to 8 letters: one time in four an English one, else made of syllables."""
    if rng.random() < 0.25:
        return rng.choice(NOUNS + QUALITIES + ACTIONS)
    while True:
        parts = (rng.choice(STARTS) + rng.choice(VOWELS) + rng.choice(ENDS) for _ in range(rng.randint(1, 2)))
        if 2 <= len(made := "".join(parts)) <= 8:
            return made


def phrase(rng: Random, longest: int = 16) -> str:
    """One or two words, at most `longest` characters."""
    while True:
        if len(made := " ".join(word(rng) for _ in range(rng.randint(1, 2)))) <= longest:
            return made


def sentence(rng: Random) -> str:
    """A short lower-case English sentence without punctuation."""
    thing = f"{rng.choice(OWNERS)} {rng.choice(NOUNS)}"
    rare = word(rng)
    forms = (
        f"{rng.choice(GREETINGS)} {thing}",
        f"{thing} is {rng.choice(QUALITIES)}",
        f"where is {thing}",
        f"you are {rng.choice(QUALITIES)} and {rng.choice(QUALITIES)}",
        f"{thing} is {rng.choice(ACTIONS)} {rng.choice(PLACES)}",
        f"{thing} of {rare}",
        f"{rare} and {thing} are {rng.choice(QUALITIES)}",
        f"i am {rng.choice(ACTIONS)} with {thing}",
        f"give {rare} to {thing}",
    )
    return rng.choice(forms)


def scrawl(rng: Random) -> str:
    """What somebody might type: a sentence or phrase with capitals, digits and punctuation strewn in."""
    text = sentence(rng) if rng.random() < 0.5 else phrase(rng)
    if rng.random() < 0.5:
        text = text.capitalize()
    letters = list(text)
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(letters))
        letters[at] = rng.choice(
            (letters[at].upper(), *string.digits[:4], rng.choice(string.ascii_uppercase))
        )
    if rng.random() < 0.5:
        letters.append(rng.choice(".?!"))
    return "".join(letters)
