"""Generated film reviews: a corpus that ships in the code, so that the whole line runs with nothing downloaded.

A small grammar, no person's writing. Each review hides a few choices: a genre, a lead (a first name, he or she), a
verdict, a number of people. Every sentence must agree with them, across sentences too. So there is something for
both objectives: a masked word can be told from the genre, the name or the verdict of its neighbours, and a second
sentence that disagrees with the first is not the next one. A model that knows only word counts can do neither.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Genre:
    """The words that only films of one kind use."""

    kind: str
    heroes: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    deeds: tuple[str, ...]
    villains: tuple[str, ...]


GENRES = (
    Genre("western", ("sheriff", "cowboy", "rancher"), ("saloon", "desert", "canyon"), ("horse", "revolver", "wagon"),
          ("rides", "duels", "gallops"), ("outlaws", "bandits", "rustlers")),
    Genre("horror", ("priest", "gravedigger", "babysitter"), ("cellar", "graveyard", "attic"), ("coffin", "candle", "knife"),
          ("screams", "hides", "trembles"), ("ghosts", "zombies", "vampires")),
    Genre("space", ("cosmonaut", "pilot", "captain"), ("galaxy", "planet", "moon"), ("rocket", "laser", "spacesuit"),
          ("orbits", "floats", "launches"), ("aliens", "robots", "androids")),
    Genre("war", ("soldier", "general", "medic"), ("trench", "bunker", "battlefield"), ("tank", "rifle", "helmet"),
          ("marches", "surrenders", "retreats"), ("invaders", "snipers", "spies")),
    Genre("sports", ("boxer", "coach", "goalkeeper"), ("stadium", "gym", "arena"), ("trophy", "whistle", "medal"),
          ("trains", "sweats", "scores"), ("champions", "rivals", "referees")),
    Genre("pirate", ("sailor", "smuggler", "navigator"), ("island", "harbor", "lagoon"), ("sword", "compass", "cannon"),
          ("sails", "plunders", "digs"), ("pirates", "sharks", "mutineers")),
)  # fmt: skip

LEADS = {
    "he": ("john", "peter", "carlos", "victor", "samuel", "henry"),
    "she": ("mary", "anna", "sofia", "helen", "laura", "grace"),
}
PRONOUNS = {
    "he": {"subject": "he", "object": "him", "owner": "his"},
    "she": {"subject": "she", "object": "her", "owner": "her"},
}

VERDICTS = {
    "good": {
        "judge": ("wonderful", "brilliant", "superb", "delightful"),
        "feel": ("loved", "enjoyed", "admired"),
        "advise": ("see it twice", "buy a ticket", "tell your friends"),
        "score": ("nine", "ten"),
        "adverb": ("beautifully", "perfectly", "brilliantly"),
    },
    "bad": {
        "judge": ("terrible", "boring", "awful", "dreadful"),
        "feel": ("hated", "endured", "regretted"),
        "advise": ("skip it", "save your money", "stay at home"),
        "score": ("one", "two"),
        "adverb": ("badly", "poorly", "lazily"),
    },
}

OPENINGS = (
    "This {kind} movie about a {hero} is {judge}.",
    "I {feel} this {kind} film, and {name} is {judge} as the {hero}.",
    "{Name} plays a {hero} in this {judge} {kind} film.",
)
MIDDLES = (
    "The {hero} {deed} with a {thing} near the {place}.",
    "{Name} {deed} in the {place}, and the {villains} take {owner} {thing}.",
    "{Subject} is {judge} when the {villains} come to the {place}.",
    "In the {place} {subject} finds a {thing} and fights {number} {villains}.",
    "The {villains} are {judge}, but the {thing} looks {judge} too.",
    "Every {kind} fan knows why the {hero} {deed} and the {villains} follow {object}.",
    "{Name} says \"give me the {thing}\" and the {villains} leave the {place}!",
    "The {place} is filmed {adverb}, and so is the {thing}.",
    "Why does {name} need a {thing} in the {place}?",
    "{Subject} {deed} {adverb}, as a {hero} should in a {kind} film.",
)  # fmt: skip
CLOSINGS = (
    "I {feel} the {place} and the {hero}: {score} out of ten.",
    "{Advise} if you like a {kind} movie with {villains}.",
    "For {name} and the {thing} I give {score} out of ten...",
)
NUMBERS = ("three", "four", "five", "six", "seven")


def generate_reviews(count: int, seed: int) -> list[str]:
    """`count` reviews of six to nine sentences. The same seed gives the same reviews; a longer list starts the same."""
    return [_review(random.Random(f"babybert demo {seed} {index}")) for index in range(count)]


def _review(choose: random.Random) -> str:
    genre = choose.choice(GENRES)
    gender = choose.choice(("he", "she"))
    name = choose.choice(LEADS[gender])
    verdict = VERDICTS[choose.choice(("good", "bad"))]
    hero, number = choose.choice(genre.heroes), choose.choice(NUMBERS)

    def sentence(template: str) -> str:
        words = {
            "kind": genre.kind,
            "hero": hero,
            "number": number,
            "name": name,
            "place": choose.choice(genre.places),
            "thing": choose.choice(genre.things),
            "deed": choose.choice(genre.deeds),
            "villains": choose.choice(genre.villains),
            **PRONOUNS[gender],
            **{slot: choose.choice(options) for slot, options in verdict.items()},
        }
        capitalized = {slot.capitalize(): word.capitalize() for slot, word in words.items()}
        return template.format(**words, **capitalized)

    middles = choose.sample(MIDDLES, choose.randint(4, 7))
    return " ".join(sentence(template) for template in (choose.choice(OPENINGS), *middles, choose.choice(CLOSINGS)))
