"""The demo's reviews are reproducible and consistent."""

import re

from babybert.corpus.demo import GENRES, PRONOUNS, generate_reviews


def test_the_same_seed_gives_the_same_reviews_and_a_longer_list_starts_the_same() -> None:
    assert generate_reviews(5, seed=3) == generate_reviews(9, seed=3)[:5]
    assert generate_reviews(5, seed=3) != generate_reviews(5, seed=4)


def test_a_review_agrees_with_itself() -> None:
    for review in generate_reviews(200, seed=0):
        words = set(re.split(r"[\s.,\"!?:]+", review.lower()))
        kinds = {g.kind for g in GENRES if words & {g.kind, *g.heroes, *g.places, *g.things, *g.deeds, *g.villains}}
        assert len(kinds) == 1, review
        assert not {"he", "him", "his"} & words or not {"she", "her"} & words, review
        assert "{" not in review


def test_no_word_belongs_to_two_genres() -> None:
    words = [word for g in GENRES for word in {g.kind, *g.heroes, *g.places, *g.things, *g.deeds, *g.villains}]
    assert len(words) == len(set(words))
    assert set(PRONOUNS) == {"he", "she"}
