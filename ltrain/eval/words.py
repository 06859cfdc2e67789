"""Words, names and numbers that prompts are made of."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    amber ancient bitter bold brave bright brisk calm clever copper coral cosmic crisp curious damp
    dapper distant dusty eager early fancy feeble fierce floral foggy formal frosty gentle giant golden
    grand hazy hidden hollow humble icy idle jolly keen lazy light lively lonely lucky marble mellow
    merry misty modest narrow noble odd olive pale patient plain polite proud quaint quick quiet rapid
    rare rough royal rustic salty scarlet sharp shiny silent silver simple sleepy smooth snowy solar
    solid spare steady stormy strict subtle sunny tame tender tidy tiny vast velvet violet warm wild
    windy wise witty young zesty
    """
)
NOUNS = _words(
    """
    anchor apple arrow badge barrel basket beacon bell bench berry blanket boat bottle branch bridge
    broom bucket button cabin candle canoe carpet castle cedar chair chimney circle clock cloud coat
    comet compass corner cradle crane crown curtain desert diamond drum eagle engine falcon feather
    fence field flame flute forest fossil fountain garden gate glacier glove hammer harbor harvest hat
    hill island jacket jar journal kettle key kite ladder lake lamp lantern leaf lemon letter magnet
    maple market meadow mirror mountain needle oak ocean orchard otter oven paddle palace parrot pebble
    pencil pepper piano pillow pilot planet pond porch puzzle quilt rabbit raft ribbon river robin
    rocket saddle sail salmon scarf shelf shell ship shovel signal spoon spring stable station stone
    summit table temple thread tiger timber tower trail train tulip tunnel turtle valley village violin
    wagon wall whale wheel willow window wolf yard
    """
)
VERBS = _words(
    """
    admires avoids borrows carries cleans covers crosses draws fears finds follows gathers guards hides
    joins keeps leaves likes loses measures mends misses moves needs notices opens paints passes
    protects reaches remembers repairs sees sells shows studies touches visits wants watches
    """
)
NAMES = _words(
    """
    Ada Alan Amir Anya Boris Carla Chen Clara Dario Edith Elena Emil Farah Felix Greta Hana Hugo Ines
    Ivan Jonas Jun Kamal Karin Lars Leila Lena Luca Maja Marco Mei Mila Nadia Nils Nora Olga Omar Otto
    Pablo Petra Priya Ravi Rosa Sami Sara Selma Sven Tara Tomas Uma Vera Viktor Wanda Yara Yuki Zara
    """
)
SURNAMES = _words(
    """
    Abel Bauer Becker Berg Blum Castro Cole Costa Diaz Dorn Egger Falk Fischer Frost Gomez Haas Hale
    Holm Ito Jansen Kaya Keller Klein Kovac Lang Lopez Marsh Meyer Moreau Nash Novak Okada Olsen Park
    Perez Quinn Reyes Roth Sato Silva Stein Stone Tanaka Torres Vance Vogel Weber West Wolf Young
    """
)
TOWNS = _words(
    """
    Alden Barrow Calder Corvin Dellwood Elmore Fenwick Garrow Halden Ivybridge Jarrow Kelso Lanmere
    Marlow Northam Oakridge Penrith Quarley Redmere Selby Thornbury Ulverton Wexcombe Yarmont
    """
)
TRADES = _words(
    """
    baker builder carpenter chemist clerk cook dentist doctor farmer fisher gardener glazier jeweller
    judge lawyer librarian mason miller nurse painter pilot plumber potter printer sailor sculptor smith
    tailor teacher weaver
    """
)


def key(rng: np.random.Generator) -> str:
    """An adjective and a noun, `brisk-otter`."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: np.random.Generator) -> str:
    """Seven digits, the first not 0."""
    return str(rng.integers(1_000_000, 10_000_000))


def identifier(rng: np.random.Generator) -> str:
    """A random UUID."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


# Repeats in a row after which there are few new words left.
TIRED = 20


def distinct(rng: np.random.Generator, make: Callable[[np.random.Generator], str], count: int) -> list[str]:
    """`count` different results of `make(rng)`; where they run out, two joined by a hyphen."""
    found: dict[str, None] = {}
    repeats = 0
    while len(found) < count:
        made = make(rng) if repeats < TIRED else f"{make(rng)}-{make(rng)}"
        if made in found:
            repeats += 1
        else:
            found[made] = None
            repeats = repeats if repeats >= TIRED else 0
    return list(found)
