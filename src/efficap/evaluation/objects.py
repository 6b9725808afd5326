"""Objects that captions name: COCO's 80 categories, and whether anybody else saw them in the picture.

After CHAIR (Rohrbach et al. 2018, https://aclanthology.org/D18-1437), with a shorter list of synonyms: its numbers
compare with each other, not with those of papers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from efficap.errors import InputError
from efficap.evaluation.grounding import words_of

# Category: other words for it. Plurals are found by themselves.
_CATEGORIES = """\
person: man, woman, boy, girl, child, children, kid, baby, toddler, lady, guy, men, women, people, persons, player, \
surfer, skier, snowboarder, skateboarder, rider, cyclist, batter, pitcher, catcher, crowd, couple, adult, male, female
bicycle: bike, bicyclist
car: automobile, sedan, suv, taxi, cab, minivan
motorcycle: motorbike, scooter, moped, motor bike
airplane: plane, jet, aircraft, airliner, biplane, jetliner, aeroplane
bus: minibus, double decker
train: locomotive, tram, trolley, subway, caboose
truck: pickup, lorry, semi, firetruck, fire truck
boat: ship, sailboat, canoe, kayak, raft, yacht, gondola, ferry
traffic light: street light, traffic signal, stop light, stoplight
fire hydrant: hydrant
stop sign:
parking meter:
bench: pew
bird: seagull, pigeon, parrot, duck, goose, geese, owl, eagle, swan, rooster, ostrich, flamingo, penguin
cat: kitten, kitty
dog: puppy, puppies, pup, poodle, terrier, dachshund, bulldog
horse: pony, ponies, foal, stallion
sheep: lamb, ram, ewe
cow: cattle, calf, calves, bull, ox, oxen, steer
elephant:
bear: polar bear, grizzly, panda
zebra:
giraffe:
backpack: knapsack, rucksack, back pack
umbrella: parasol
handbag: purse
tie: necktie, bow tie, bowtie
suitcase: luggage, briefcase
frisbee:
skis: ski
snowboard:
sports ball: soccer ball, tennis ball, ball
kite:
baseball bat: bat
baseball glove: mitt, baseball mitt
skateboard: skate board
surfboard: surf board
tennis racket: racket, racquet, tennis racquet
bottle: beer bottle, water bottle
wine glass: wineglass
cup: mug, teacup
fork:
knife: knives
spoon:
bowl:
banana:
apple:
sandwich: burger, hamburger, cheeseburger, sub
orange:
broccoli:
carrot:
hot dog: hotdog
pizza:
donut: doughnut
cake: cupcake, cheesecake
chair: stool, recliner, armchair
couch: sofa, loveseat, futon
potted plant: houseplant, flowerpot, house plant
bed: mattress
dining table: table, desk
toilet: urinal, commode
tv: television, monitor, television set
laptop: notebook computer, laptop computer
mouse: computer mouse
remote: remote control, wii remote, wiimote
keyboard: computer keyboard
cell phone: cellphone, phone, smartphone, iphone, mobile phone
microwave: microwave oven
oven: stove, stove top
toaster:
sink: washbasin
refrigerator: fridge, freezer
book:
clock: wall clock, clock tower
vase:
scissors: shears
teddy bear: teddy, stuffed bear, stuffed animal
hair drier: hairdryer, hair dryer, blow dryer
toothbrush:
"""
# Words that are no object, though they look like one or one of theirs is.
_OTHERS = (
    "orange, skies, train track, train tracks, train station, bus stop, bus station, dog house, bird house, \
toilet paper, toilet seat, book shelf, table tennis"
)


def _phrases() -> dict[tuple[str, ...], str]:
    phrases: dict[tuple[str, ...], str] = {}
    for line in _CATEGORIES.splitlines():
        category, _, synonyms = line.partition(":")
        for name in filter(None, (category, *map(str.strip, synonyms.split(",")))):
            ies = [f"{name[:-1]}ies"] if re.search("[^aeiou]y$", name) else []
            for form in (name, f"{name}s", f"{name}es", *ies):
                phrases.setdefault(tuple(form.split()), category)
    return phrases | {tuple(name.split()): "" for name in _OTHERS.split(", ")}


_PHRASES = _phrases()
_LONGEST = max(map(len, _PHRASES))


def objects_in(caption: str) -> list[str]:
    """The categories that a caption names, once for each mention; of overlapping names the longest counts."""
    words, found, place = words_of(caption), [], 0
    while place < len(words):
        for size in range(_LONGEST, 0, -1):
            category = _PHRASES.get(tuple(words[place : place + size]))
            if category is not None:
                found += [category] if category else []
                place += size
                break
        else:
            place += 1
    return found


def read_instances(file: Path) -> dict[str, set[str]]:
    """The categories in each picture of COCO's instance annotations, by the picture's file name.

    Raises:
        InputError: the file cannot be read or is none of COCO's.
    """
    setting = f"checks.instances={file}"
    try:
        content = json.loads(file.read_bytes())
        names = {category["id"]: category["name"] for category in content["categories"]}
        seen: dict[str, set[str]] = {image["file_name"]: set() for image in content["images"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            seen[files[annotation["image_id"]]].add(names[annotation["category_id"]])
    except OSError as error:
        raise InputError(f"{setting} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{setting} has no instance annotations as COCO's instances_val2014.json ({type(error).__name__}: {error})"
        ) from error
    return seen


def hallucinated_share(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    instances: Mapping[str, set[str]] | None = None,
) -> float | None:
    """The share of the objects named in captions that no reference names, nor an instance annotation shows (CHAIR_i).

    Args:
        predictions: image id, which ends with the picture's file name -> caption.
        references: image id -> texts.
        instances: of `read_instances`; None: the references alone.

    Returns:
        0 to 1; None where no caption names an object. Pictures of which nobody says what is there are left out.

    Raises:
        InputError: instance annotations of other pictures.
    """
    named = wrong = known = 0
    for image_id, caption in predictions.items():
        there = {category for text in references[image_id] for category in objects_in(text)}
        marked = (instances or {}).get(PurePosixPath(image_id).name)
        known += marked is not None
        if marked is None and not references[image_id]:
            continue  # nobody says what is there
        there |= marked or set()
        mentions = objects_in(caption)
        named += len(mentions)
        wrong += sum(category not in there for category in mentions)
    if instances is not None and not known:
        raise InputError(
            f"checks.instances has none of the {len(predictions):,} pictures, such as {next(iter(predictions))}; give "
            "those of the split"
        )
    return wrong / named if named else None
