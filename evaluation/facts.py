"""
Short texts full of facts, and what tells whether a reader knows them.

Each text comes with its **twin**: the same sentences with the facts exchanged, so that what is true of one is false of
the other. A reader that does not see the text prefers the same answer for both, and is right in exactly half of them,
whatever it knows about the world or likes to say.

A fact is altered in one of two ways. *In the text*: the other value belongs to another sentence of the same text, so
a reader has to know what belongs to what. *Not in the text*: it occurs nowhere, so knowing which words occurred is
enough.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """A question about a text, with its true answer and a false one. `values` are the words that tell them apart."""

    kind: str
    question: str
    answers: tuple[str, str]
    values: tuple[str, str]

    def reversed(self) -> "Probe":
        """The probe of the twin, where the other answer is true."""
        return Probe(self.kind, self.question, self.answers[::-1], self.values[::-1])


PLACES = (
    "Halden Brixen Coimbra Dorking Esbjerg Fulda Gotland Hobart Ipswich Jasper Kendal Lugano Malmo Namur Oulu Pula "
    "Quimper Riga Siena Tartu Utrecht Varna Wexford Zadar"
).split()
GIVEN = (
    "Ada Boris Clara Dmitri Elena Felix Greta Hugo Ines Jonas Karin Leo Mira Nils Olga Pavel Rosa Stefan Tilda Viktor"
).split()
SURNAMES = (
    "Abara Brandt Castillo Dvorak Eriksen Ferrari Grimaldi Hassan Ivanova Jensen Kovacs Lindqvist Moreau Novak Okafor "
    "Petrov Quist Rossi Santos Tanaka Vasquez Weber Yilmaz Zeller"
).split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)  # fmt: skip
RARE = (
    "theodolite clavichord samovar palanquin hygrometer bassoon sextant zither sundial metronome barometer narwhal "
    "chasuble mandolin tapir loom gyroscope harpoon lute kaleidoscope"
).split()

# kind: sentence, question, answer; {place} is what the fact is about, {value} the fact.
VALUES = {
    "numbers": [
        ("The tower in {place} has {value} steps.", "How many steps does the tower in {place} have?"),
        ("The library in {place} holds {value} maps.", "How many maps does the library in {place} hold?"),
    ],
    "names": [
        ("The bakery in {place} belongs to {value}.", "Who owns the bakery in {place}?"),
        ("The school in {place} is led by {value}.", "Who leads the school in {place}?"),
    ],
    "dates": [
        ("The bridge in {place} was opened on {value}.", "When was the bridge in {place} opened?"),
        ("The old mill in {place} burned down on {value}.", "When did the old mill in {place} burn down?"),
    ],
    "rare words": [
        ("The museum in {place} shows a {value}.", "What does the museum in {place} show?"),
        ("The thief in {place} stole a {value}.", "What did the thief in {place} steal?"),
    ],
}
NEGATIONS = [
    ("The ferry to {place} runs in winter.", "The ferry to {place} does not run in winter."),
    ("The well in {place} is dry.", "The well in {place} is not dry."),
    ("The doctor in {place} speaks French.", "The doctor in {place} does not speak French."),
]
NEGATION_QUESTIONS = [
    "Does the ferry to {place} run in winter?",
    "Is the well in {place} dry?",
    "Does the doctor in {place} speak French?",
]


Pair = list[tuple[str, list[Probe]]]  # a text and its twin, each with its probes


def make_pair(seed: int) -> Pair:
    """
    A text and its twin, each with its probes: two of every kind in `VALUES` (altered in the text, and not in the
    text), one of a negation, one of an order.
    """
    rng = random.Random(seed)
    places = rng.sample(PLACES, len(PLACES))
    people = [
        f"{given} {surname}" for given, surname in zip(rng.sample(GIVEN, 6), rng.sample(SURNAMES, 6), strict=True)
    ]
    values = {
        "numbers": [str(number) for number in rng.sample(range(11, 990), 4)],
        "names": people[:4],
        "dates": [
            f"{rng.randint(1, 28)} {month} {year}"
            for month, year in zip(rng.sample(MONTHS, 4), rng.sample(range(1801, 2000), 4), strict=True)
        ],
        "rare words": rng.sample(RARE, 4),
    }
    sentences: list[tuple[str, str]] = []  # of the text and of its twin
    probes: list[Probe] = []
    for kind, templates in VALUES.items():
        first, second, present, absent = values[kind]
        (sentence, question), (other_sentence, other_question) = rng.sample(templates, 2)
        here, there, elsewhere = (places.pop() for _ in range(3))

        def say(template: str, place: str, value: str, other: str) -> tuple[str, str]:
            return template.format(place=place, value=value), template.format(place=place, value=other)

        exchanged = say(sentence, here, first, second)
        foreign = say(other_sentence, elsewhere, present, absent)
        sentences += [exchanged, say(sentence, there, second, first), foreign]
        probes += [
            Probe(f"{kind}, in the text", question.format(place=here), exchanged, (first, second)),
            Probe(f"{kind}, not in the text", other_question.format(place=elsewhere), foreign, (present, absent)),
        ]
    place, index = places.pop(), rng.randrange(len(NEGATIONS))
    said, denied = (template.format(place=place) for template in NEGATIONS[index])
    answers = (f"Yes. {said}", f"No. {denied}")
    sentences.append((said, denied))
    probes.append(Probe("negations", NEGATION_QUESTIONS[index].format(place=place), answers, ("yes", "no")))

    place, (early, late) = places.pop(), people[4:]
    order = "{} came to {} first, and {} came a year later."
    sentences.append((order.format(early, place, late), order.format(late, place, early)))
    answers = (f"{early} came to {place} first.", f"{late} came to {place} first.")
    probes.append(Probe("order", f"Who came to {place} first?", answers, (early, late)))

    rng.shuffle(sentences)
    text, twin = (" ".join(half) for half in zip(*sentences, strict=True))
    flip = rng.random() < 0.5  # which of the two says more often "not" or comes first is left to chance
    pair = [(text, probes), (twin, [probe.reversed() for probe in probes])]
    return pair[::-1] if flip else pair
