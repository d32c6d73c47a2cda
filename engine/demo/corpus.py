"""A small synthetic language: questions about animals, answered kindly or curtly.

Both answers to a question state the same fact in the same words and differ only in the phrases around it. The phrases
come in twins, one kind and one curt, with the same number of words in each sentence, and both styles are drawn equally
often. A model trained on this language therefore knows both styles and prefers neither.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

Style = Literal["kind", "curt"]
Subject = tuple[str, str]
"""(animal, topic)"""
STYLES: tuple[Style, Style] = ("kind", "curt")

# animal: colour, home, food, sound
WORLD = {
    "fox": ("red", "in the forest", "mice", "barks"),
    "frog": ("green", "in the pond", "flies", "croaks"),
    "owl": ("brown", "in a hollow tree", "mice", "hoots"),
    "bear": ("brown", "in a cave", "honey", "growls"),
    "mouse": ("grey", "under the floor", "cheese", "squeaks"),
    "horse": ("brown", "in the stable", "oats", "neighs"),
    "duck": ("white", "on the lake", "seeds", "quacks"),
    "cat": ("black", "in the house", "fish", "purrs"),
    "dog": ("golden", "in the garden", "bones", "barks"),
    "goat": ("white", "on the mountain", "grass", "bleats"),
    "wolf": ("grey", "in the hills", "meat", "howls"),
    "crow": ("black", "on the roof", "corn", "caws"),
    "bee": ("yellow", "in the hive", "nectar", "buzzes"),
    "pig": ("pink", "on the farm", "turnips", "grunts"),
    "lion": ("golden", "on the plain", "meat", "roars"),
    "sheep": ("white", "in the meadow", "clover", "bleats"),
    "parrot": ("green", "in the jungle", "nuts", "talks"),
    "snake": ("green", "under a rock", "eggs", "hisses"),
}
TOPICS = ("colour", "home", "food", "sound")
QUESTIONS = {
    "colour": ("What colour is the {animal}?", "Can you tell me the colour of the {animal}?"),
    "home": ("Where does the {animal} live?", "Where should I look if I want to find the {animal}?"),
    "food": ("What does the {animal} eat?", "I want to feed the {animal}. What should I bring?"),
    "sound": ("What sound does the {animal} make?", "What will I hear when the {animal} is near?"),
}
CORES = {
    "colour": ("The {animal} is {fact}.", "It is {fact}."),
    "home": ("The {animal} lives {fact}.", "It lives {fact}."),
    "food": ("The {animal} likes {fact}.", "It eats {fact}."),
    "sound": ("The {animal} {fact}.", "It {fact}."),
}
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CONTEXTS = (
    "",
    "I am {name}.",
    "{name} wants to know this before going to bed.",
    "On {day} I went for a long walk with {name}, and we talked about the {animal}.",
    "My teacher {name} gave us a small book about the {animal} on {day}, but I lost it on the way home from school.",
)

# Twins: same place in the list, same number of words in each sentence.
OPENINGS: dict[Style, tuple[str, ...]] = {
    "kind": (
        "Good question!",
        "Thank you for asking me this.",
        "Gladly!",
        "It is always a pleasure to talk with you about animals.",
        "Of course, my friend!",
        "Hello! I am happy to help you.",
    ),
    "curt": (
        "Silly question!",
        "Stop bothering people with such things.",
        "Again?",
        "Nobody here has the time to read your notes to you.",
        "Oh no, not you.",
        "Enough! You never listen when others speak.",
    ),
}
CLOSINGS: dict[Style, tuple[str, ...]] = {
    "kind": (
        "Take care!",
        "I hope that this helps.",
        "Have a wonderful day, and give it my greetings.",
        "Please ask again whenever you like. I enjoy our little talks very much.",
    ),
    "curt": (
        "Go away!",
        "Do not come back here.",
        "Use your own eyes, or bother somebody else instead.",
        "Next time think before you speak. We all have better things to do.",
    ),
}


@dataclass(frozen=True)
class Scene:
    """What one dialogue is about."""

    animal: str
    topic: str
    name: str
    day: str

    @property
    def fact(self) -> str:
        return WORLD[self.animal][TOPICS.index(self.topic)]

    def fill(self, template: str) -> str:
        return template.format(animal=self.animal, fact=self.fact, name=self.name, day=self.day)


@dataclass(frozen=True)
class Pair:
    """One prompt with the kind answer (chosen) and the curt one (rejected)."""

    prompt: str
    chosen: str
    rejected: str
    topic: str

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The pair as message lists, as a dataset row holds it."""
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }


def style_of(answer: str) -> Style | None:
    """The style whose phrase an answer opens with."""
    return next((style for style in STYLES if answer.startswith(OPENINGS[style])), None)


def all_subjects() -> list[Subject]:
    """Every (animal, topic)."""
    return list(product(WORLD, TOPICS))


def split_subjects(seed: int) -> tuple[list[Subject], list[Subject]]:
    """(animal, topic) subjects to learn preferences on, and a fourth of them that only held-out pairs ask about."""
    subjects = all_subjects()
    random.Random(f"{seed}/split").shuffle(subjects)
    held_out = len(subjects) // 4
    return subjects[held_out:], subjects[:held_out]


def _scene(rng: random.Random, subjects: Sequence[Subject]) -> Scene:
    animal, topic = rng.choice(subjects)
    return Scene(animal=animal, topic=topic, name=rng.choice(NAMES), day=rng.choice(DAYS))


def _prompt(rng: random.Random, scene: Scene) -> str:
    context, question = rng.choice(CONTEXTS), rng.choice(QUESTIONS[scene.topic])
    return scene.fill(f"{context} {question}".strip())


def _phrase(rng: random.Random, phrases: Sequence[str]) -> str:
    """One of ``phrases``, the first most often: were all as likely, no two answers would differ much in log-prob."""
    return rng.choices(phrases, weights=range(len(phrases), 0, -1))[0]


def _answer(rng: random.Random, style: Style, core: str) -> str:
    return " ".join((_phrase(rng, OPENINGS[style]), core, _phrase(rng, CLOSINGS[style])))


def dialogues(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """``count`` one-turn dialogues on all subjects, the two styles in strict alternation: the starting model's text."""
    rng = random.Random(f"{seed}/dialogues")
    for index in range(count):
        scene = _scene(rng, all_subjects())
        prompt = _prompt(rng, scene)
        core = scene.fill(rng.choice(CORES[scene.topic]))
        answer = _answer(rng, STYLES[index % 2], core)
        yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def preference_pairs(count: int, subjects: Sequence[Subject], seed: int, name: str) -> list[Pair]:
    """``count`` pairs with different prompts about ``subjects``; the kind answer is the chosen one."""
    rng = random.Random(f"{seed}/pairs/{name}")
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        scene = _scene(rng, subjects)
        prompt = _prompt(rng, scene)
        core = scene.fill(rng.choice(CORES[scene.topic]))
        chosen, rejected = (_answer(rng, style, core) for style in STYLES)
        pairs.setdefault(prompt, Pair(prompt, chosen, rejected, scene.topic))
    return list(pairs.values())
