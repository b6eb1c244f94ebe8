"""Keys and values of the tasks: word pairs, numbers, UUIDs, drawn from a seeded generator."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

ADJECTIVES = """
able agile amber ancient arctic austere autumn bashful bitter blazing bold brave breezy bright brisk broken
bronze bumpy calm careful chilly clever cloudy coastal copper cosmic crimson crispy curious dapper daring deep
distant drowsy dusty eager earnest elastic emerald faded famous fearless feathered fierce flaky fluffy foggy
fragile frosty frozen fuzzy gentle giddy gilded glossy golden grumpy hasty hazel hidden hollow humble hungry
icy idle ivory jagged jolly jovial keen kindly lavish lazy lively lofty lonely loyal lucky lunar magenta
mellow merry misty modest muddy narrow nimble noble noisy oblong orange ornate pale patient pearly placid
plucky polished proud purple quaint quick quiet radiant rapid restless rocky royal ruby rugged rustic salty
scarlet shady shiny silent silver sleepy slender smoky snowy solar solemn sparse spicy spotted stormy sturdy
sunny swift tame tangy tender tidy tiny topaz tranquil tropical unruly upbeat velvet vibrant violet vivid
wandering wary wild windy winter wise witty woolly yellow zesty
""".split()

NOUNS = """
acorn anchor antler apricot arrow badger bagel balcony bamboo banjo barley beacon beaver biscuit blanket
blossom bonnet boulder bramble bridge bucket buffalo cabin cactus camel candle canyon carrot castle cedar
cello chapel cherry chimney cider cinnamon clarinet clover cobbler compass coral cottage cricket crystal
curtain cypress daisy dolphin dragon drummer eagle easel elbow engine falcon feather fiddle finch forest
fountain galaxy garden garlic geyser ginger glacier goblet gondola gopher grape grove hammock harbor harvest
hazelnut heron hillside honey iceberg island jasmine jigsaw juniper kettle kitten ladder lagoon lantern lemon
lettuce lily lizard lobster magnet mango maple marble meadow melon mitten monsoon mountain muffin mushroom
nectar needle nutmeg oasis ocean olive onion orchard orchid otter oyster paddle panther papaya parrot peacock
pebble pelican pepper pigeon pillow pirate planet plaza pocket pony puddle puffin pumpkin quarry rabbit
raccoon radish raven ribbon river robin rocket saddle saffron salmon satchel scooter shadow shovel sparrow
spinach spiral sponge squirrel stadium starling statue sunset tavern teapot temple thimble thunder tiger
timber tomato trumpet tulip tunnel turnip turtle valley vessel village viola volcano waffle wagon walnut
walrus whistle willow window wizard yogurt zebra zipper
""".split()


def word_pair(rng: random.Random) -> str:
    """An adjective-noun key, 'amber-falcon'."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: random.Random, digits: int = 7) -> str:
    """A number of exactly `digits` digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def uuid_like(rng: random.Random) -> str:
    """A version 4 UUID drawn from `rng`."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


KINDS: dict[str, Callable[[random.Random], str]] = {"word": word_pair, "number": number, "uuid": uuid_like}
PLURALS = {"word": "words", "number": "numbers", "uuid": "uuids"}


def distinct(make: Callable[[random.Random], str], count: int, rng: random.Random) -> list[str]:
    """`count` different strings."""
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen.setdefault(make(rng))
    return list(seen)


def similar_keys(key: str, count: int, rng: random.Random) -> list[str]:
    """Word-pair keys that share the adjective or the noun of `key`."""
    adjective, noun = key.split("-", 1)
    found: dict[str, None] = {}
    while len(found) < count:
        other = f"{adjective}-{rng.choice(NOUNS)}" if rng.random() < 0.5 else f"{rng.choice(ADJECTIVES)}-{noun}"
        if other != key:
            found.setdefault(other)
    return list(found)
