"""What MiniDocs are about: entities, measures, items and sampled values; which entity belongs to which split.

Vocabulary is small on purpose. Every document draws its measures and items from the same lists, so pages of different
documents look alike to a retriever; what tells them apart is the entity. Entities are coined names, and each has an
emblem ("the Silver Heron") that only the document's cover ties to it.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
"""The three splits; shares of the entities are 70, 10 and 20 %."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAME_STARTS = _words(
    "Ald Ash Bar Bel Bran Cal Car Cor Dal Den Dor Dun El Fal Fen Gar Gil Hal Har Hol Il Jor Kel Kir Lan Len Lin "
    "Mar Mel Mor Nor Ol Pen Pol Quin Ros Sal Sel Stan Tam Tor Ul Var Ver Wes Win Yar Zel"
)
NAME_ENDS = _words(
    "beck bridge brook burg crest dale field ford gate grove ham haven holm ley mere mont mouth port stad stead "
    "vale wick wood worth"
)
_COLOURS = _words(
    "Amber Azure Black Blue Bronze Brown Coral Crimson Dark Dusky Emerald Golden Green Grey Hazel Indigo "
    "Ivory Jade Lilac Ochre Orange Pale Pearl Pink Purple Red Ruby Silver White Yellow"
)
_ANIMALS = _words(
    "Badger Bear Bison Boar Camel Cat Cobra Crane Crow Deer Dove Eagle Falcon Ferret Finch Fox Frog Goat Goose "
    "Hare Hawk Heron Horse Ibis Jackal Kite Lion Lynx Magpie Moose Otter Owl Panda Pony Raven Robin Seal Swan "
    "Tiger Wolf"
)

NOT_ANSWERABLE = "Not answerable"
"""The reference answer of a question that no page of the collection answers."""

FIGURE_NAMES = {"value": "The figure for {}", "change": "The change for {}", "share": "The share of {}"}
"""What a figure of an item is called, by its column."""


@dataclass(frozen=True)
class Entity:
    """Whom a document is about: the name its pages carry and the emblem its cover names."""

    name: str
    emblem: str


@functools.cache
def entities(split: str) -> tuple[Entity, ...]:
    """The entities of a split, in a fixed order that no seed changes; splits share neither a name nor an emblem.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; splits are {', '.join(SPLITS)}")
    names = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    emblems = [f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS]
    shuffler = random.Random("minidocs entities")
    shuffler.shuffle(names)
    shuffler.shuffle(emblems)
    pairs = [Entity(name, emblem) for name, emblem in zip(names, emblems, strict=False)]
    first, second = round(0.7 * len(pairs)), round(0.8 * len(pairs))
    start, end = {"train": (0, first), "validation": (first, second), "test": (second, len(pairs))}[split]
    return tuple(pairs[start:end])


@dataclass(frozen=True)
class Dimension:
    """What a measure is broken down by: the word in page titles, what one of them is called, preposition, items."""

    name: str
    one: str
    preposition: str
    items: tuple[str, ...]


GOODS = Dimension(
    "goods",
    "kind of goods",
    "for",
    _words(
        "Barley Butter Carpets Cement Cheese Coal Cocoa Coffee Copper Cotton Cork Fish Flour Fruit Glass Grain Honey "
        "Iron Leather Linen Maize Milk Nickel Oil Paper Rice Rubber Salt Silk Soap Steel Sugar Tea Timber Tin Wax "
        "Wheat Wine Wool Zinc"
    ),
)
COUNTRIES = Dimension(
    "country",
    "country",
    "for",
    _words(
        "Angola Belgium Bolivia Brazil Canada Chad Chile China Cuba Cyprus Denmark Egypt Estonia Fiji Finland France "
        "Ghana Greece Haiti Iceland India Iraq Italy Jamaica Japan Jordan Kenya Latvia Malta Mexico Nepal Niger "
        "Norway Oman Panama Peru Poland Spain Sweden Turkey"
    ),
)
DIVISIONS = Dimension(
    "division",
    "division",
    "in",
    _words(
        "Accounts Archive Audit Catering Claims Cleaning Design Events Export Fleet Gardens Grants Housing Legal "
        "Library Markets Media Music Parks Payroll Permits Planning Police Postal Printing Rail Records Rescue "
        "Research Retail Roads Safety Schools Sewers Stores Survey Testing Travel Waste Welfare"
    ),
)
SUBJECTS = Dimension(
    "subject",
    "subject",
    "in",
    _words(
        "Algebra Anatomy Art Biology Botany Ceramics Chess Civics Cooking Dance Drama Ecology Ethics Farming Film "
        "French Geology German Greek History Hygiene Judo Latin Law Logic Maths Mining Music Nursing Optics Painting "
        "Physics Poetry Rowing Sewing Spanish Tennis Theatre Weaving Yoga"
    ),
)
MONTHS = Dimension(
    "month",
    "month",
    "in",
    _words("January February March April May June July August September October November December"),
)
DIMENSIONS = (GOODS, COUNTRIES, DIVISIONS, SUBJECTS)

ORGANISATIONS = {
    "Port": (GOODS, COUNTRIES),
    "Works": (GOODS, DIVISIONS),
    "Council": (DIVISIONS, SUBJECTS),
    "Foods": (GOODS, COUNTRIES),
    "Lines": (COUNTRIES, DIVISIONS),
    "Trust": (SUBJECTS, DIVISIONS),
    "College": (SUBJECTS, COUNTRIES),
    "Group": DIMENSIONS,
}
"""Kinds of organisations and what their documents are about."""

SHORT_MONTHS = {month: month[:3] for month in MONTHS.items}
"""Axis labels of months; questions spell them out."""


@dataclass(frozen=True)
class Measure:
    """What a page counts. `name` is its formal label on pages, `everyday` the same in words no page uses."""

    name: str
    everyday: str
    unit: str
    dimension: Dimension
    decimals: int = 0


def _measures(dimension: Dimension, *rows: tuple[str, str, str, int]) -> tuple[Measure, ...]:
    return tuple(Measure(name, everyday, unit, dimension, decimals) for name, everyday, unit, decimals in rows)


MEASURES = (
    *_measures(
        GOODS,
        ("Exports", "how much was sent abroad", "tons", 0),
        ("Imports", "how much was brought in from elsewhere", "tons", 0),
        ("Output", "how much was made", "tons", 0),
        ("Inventory", "how much is still lying around", "tons", 0),
        ("Wastage", "how much was thrown away", "tons", 1),
        ("Demand", "how much did customers ask for", "tons", 0),
        ("Refunds", "how much money went back to buyers", "euros", 0),
        ("Tariffs", "how much has to be paid at the border", "euros", 1),
    ),
    *_measures(
        COUNTRIES,
        ("Visitors", "how many people came to look around", "persons", 0),
        ("Contracts", "how many deals were struck", "number", 0),
        ("Shipments", "how many parcels went out", "number", 0),
        ("Investment", "how much money was put in", "millions", 1),
        ("Licences", "how many permits were handed out", "number", 0),
        ("Donations", "how much was given as gifts", "euros", 0),
        ("Flights", "how often did a plane leave", "number", 0),
        ("Migration", "how many people moved house", "persons", 0),
    ),
    *_measures(
        DIVISIONS,
        ("Headcount", "how many people work there", "persons", 0),
        ("Vacancies", "how many jobs are still open", "number", 0),
        ("Expenses", "how much was paid out", "euros", 0),
        ("Absence", "how many days were lost to illness", "days", 0),
        ("Accidents", "how often was somebody hurt", "number", 0),
        ("Emissions", "how much exhaust was given off", "tons", 1),
        ("Overtime", "how many extra hours were put in", "hours", 0),
        ("Appeals", "how often did people grumble", "number", 0),
    ),
    *_measures(
        SUBJECTS,
        ("Enrolment", "how many people signed up", "persons", 0),
        ("Dropouts", "how many people gave up", "persons", 0),
        ("Lessons", "how many hours were taught", "hours", 0),
        ("Tuition", "how much does it cost to take part", "euros", 0),
        ("Prizes", "how often did somebody win", "number", 0),
        ("Bookings", "how many seats were taken", "number", 0),
        ("Workload", "how many hours does it keep people busy", "hours", 1),
        ("Textbooks", "how many volumes were bought", "number", 0),
    ),
    *_measures(
        MONTHS,
        ("Revenue", "how much money came in", "euros", 0),
        ("Traffic", "how many cars drove through", "number", 0),
        ("Rainfall", "how much water fell from the sky", "millimetres", 1),
        ("Power use", "how much did the lights and engines draw", "kilowatts", 0),
        ("Members", "how many people belonged to the club", "persons", 0),
        ("Profit", "how much was left over in the end", "euros", 0),
        ("Repairs", "how often was something mended", "number", 0),
        ("Footfall", "how many people walked in", "persons", 0),
    ),
)


@dataclass(frozen=True)
class Board:
    """A page whose question is answered by where something stands: headed boxes with one small entry each."""

    title: str
    everyday: str
    noun: str
    caption: str
    headings: tuple[str, ...]
    entries: str


_PLACES = _words(
    "Annex Atrium Balcony Bakery Barn Canteen Cellar Chapel Cinema Clinic Foyer Garage Gallery Garden Gym Hangar "
    "Harbour Kennel Kiosk Kitchen Laundry Loft Lounge Mill Museum Nursery Office Pantry Parlour Pier Pool Sauna "
    "School Shop Stable Studio Terrace Tower Vault Workshop"
)
_STEPS = _words(
    "Approval Assembly Briefing Bidding Casting Checking Costing Cutting Delivery Draft Drying Dyeing Filing "
    "Filling Firing Forging Gluing Grading Joining Loading Milling Mixing Moulding Order Packing Payment Plating "
    "Pressing Quoting Review Rinsing Sanding Sealing Signing Sketch Sorting Tasting Trial Welding Weighing"
)
SURNAMES = _words(
    "Abel Adler Baker Berg Blom Bonde Carr Cole Dahl Diaz Dunn Eder Falk Ferro Frost Gallo Haas Holm Ito Jensen "
    "Kahn Kerr Klein Koch Lamb Lund Marsh Mayer Meyer Moss Nagy Nolan Novak Okoye Olsen Park Pace Quist Rao Reyes "
    "Rossi Sato Silva Sousa Stone Swift Tanaka Toth Urban Vance Vidal Voss Wade Walsh Weber Wolfe Wong Yates York "
    "Zhou"
)
BOARDS = (
    Board("Floor plan", "where is everything in the building", "area", "room", _PLACES, "number"),
    Board("Site map", "how is the ground laid out", "plot", "lot", _PLACES, "number"),
    Board("Contacts", "who is to be called", "desk", "lead", DIVISIONS.items, "surname"),
    Board("Duty roster", "who is on call", "team", "on call", DIVISIONS.items, "surname"),
)
FLOWS = (
    Board("Process", "how is the work done", "step", "cost", _STEPS, "number"),
    Board("Roadmap", "what comes when", "stage", "budget", _STEPS, "number"),
)


@dataclass(frozen=True)
class Table:
    """One measure's values for some items, as printed, with a second column of changes against the year before."""

    measure: Measure
    items: tuple[str, ...]
    values: tuple[str, ...]
    changes: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.measure.name} by {self.measure.dimension.name}"

    @property
    def numbers(self) -> tuple[float, ...]:
        return tuple(float(value) for value in self.values)


class Sampler:
    """Values of one document: drawn uniformly, never the same twice, so that a value belongs to one place only."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self._used: set[str] = set()

    def _fresh(self, draw: object) -> str:
        while True:
            text = draw()  # type: ignore[operator]
            if text not in self._used:
                self._used.add(text)
                return text

    def value(self, decimals: int = 0) -> str:
        """A count of three digits, or of two with one decimal."""
        if decimals:
            return self._fresh(lambda: f"{self.rng.randint(100, 999) / 10:.1f}")
        return self._fresh(lambda: str(self.rng.randint(100, 999)))

    def change(self) -> str:
        """A signed change such as `+4.7%`."""
        return self._fresh(lambda: f"{self.rng.choice('+-')}{self.rng.randint(1, 9)}.{self.rng.randint(0, 9)}%")

    def surname(self) -> str:
        return self._fresh(lambda: self.rng.choice(SURNAMES))

    def shares(self, count: int) -> tuple[str, ...]:
        """Percentages with one decimal that add up to 100, all different and at least 4."""
        while True:
            weights = [self.rng.uniform(1, 5) for _ in range(count)]
            tenths = [round(1000 * w / sum(weights)) for w in weights]
            tenths[-1] += 1000 - sum(tenths)
            texts = tuple(f"{t / 10:.1f}%" for t in tenths)
            if min(tenths) >= 40 and len(set(texts)) == count and not self._used.intersection(texts):
                self._used.update(texts)
                return texts

    def table(self, measure: Measure, items: tuple[str, ...]) -> Table:
        """A table of one measure. Values of neighbouring rows differ, so bars and points can be told apart."""
        values = tuple(self.value(measure.decimals) for _ in items)
        return Table(measure, items, values, tuple(self.change() for _ in items))
