"""English sentences for text models, made from our own words: many topics, forms and lengths, the same every time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

__all__ = ["calibration_sentences", "retrieval_sentences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """What sentences of one topic are made of."""

    who: tuple[str, ...]
    did: tuple[str, ...]
    what: tuple[str, ...]
    why: tuple[str, ...]


TOPICS: Final = (
    Topic(
        who=("the head chef", "my grandmother", "a street vendor", "the baker on our corner"),
        did=("simmered", "seasoned", "slowly roasted", "forgot about", "handed out"),
        what=("a pot of lentil soup", "two trays of sourdough bread", "the lamb shoulder", "mango pancakes"),
        why=("the guests were hungry", "fresh basil was cheap", "the oven had just been repaired"),
    ),
    Topic(
        who=("the goalkeeper", "our swimming coach", "a retired cyclist", "the women's rowing team"),
        did=("trained for", "narrowly won", "lost", "celebrated after", "withdrew from"),
        what=("the regional final", "a twenty kilometre race", "the penalty shootout", "the winter marathon"),
        why=("the knee injury had healed", "it rained all weekend", "nobody had expected it"),
    ),
    Topic(
        who=("the central bank", "a small investor", "the accounting department", "an insurance company"),
        did=("raised", "misjudged", "published", "hedged against", "quietly wrote off"),
        what=("the interest rate", "quarterly earnings", "its mortgage portfolio", "a loan of 40,000 euros"),
        why=("inflation stayed above 3 %", "exports had collapsed", "the auditors asked for it"),
    ),
    Topic(
        who=("a young astronomer", "the probe", "a team of physicists", "the space agency"),
        did=("measured", "photographed", "predicted", "lost contact with", "orbited"),
        what=("a distant galaxy", "the rings of Saturn", "a near-Earth asteroid", "the decay of a neutron star"),
        why=("the telescope had a new mirror", "theory and data disagreed", "solar wind disturbed the signal"),
    ),
    Topic(
        who=("the cardiologist", "a night nurse", "the pharmacist", "an elderly patient"),
        did=("prescribed", "refused", "asked about", "carefully documented", "stopped"),
        what=("a low dose of aspirin", "the new vaccine", "a blood pressure monitor", "the allergy treatment"),
        why=("the fever came back", "side effects are rare", "the insurance would pay for it"),
    ),
    Topic(
        who=("a junior developer", "the database administrator", "our web server", "the security team"),
        did=("crashed on", "rewrote", "benchmarked", "rolled back", "audited"),
        what=("a Python script", "the login page", "three SQL queries", "an encryption library"),
        why=("the unit tests failed", "a memory leak had been reported", "the release was due on Friday"),
    ),
    Topic(
        who=("a brown bear", "the beekeeper", "two herons", "a marine biologist"),
        did=("followed", "fed on", "watched", "protected", "frightened away"),
        what=("a school of salmon", "the young oak trees", "wild honey bees", "a colony of seals"),
        why=("the river was warmer than usual", "spring arrived early", "hunters had left the valley"),
    ),
    Topic(
        who=("the mayor", "an opposition leader", "the supreme court", "a group of tenants"),
        did=("rejected", "debated", "signed", "protested against", "postponed"),
        what=("the housing reform", "a ban on diesel cars", "the election result", "higher property taxes"),
        why=("voters demanded it", "the budget was exhausted", "a compromise seemed possible"),
    ),
    Topic(
        who=("a jazz pianist", "the museum director", "an unknown painter", "the choir"),
        did=("rehearsed", "sold", "restored", "improvised over", "donated"),
        what=("a portrait in oil", "Bach's cello suites", "a marble sculpture", "an old folk song"),
        why=("the exhibition opens tomorrow", "critics had ignored it for decades", "the acoustics were perfect"),
    ),
    Topic(
        who=("a backpacker", "the train conductor", "our tour guide", "a tired family of five"),
        did=("missed", "booked", "cancelled", "recommended", "waited hours for"),
        what=("the ferry to the islands", "a room near the harbour", "the night train to Lisbon", "a desert safari"),
        why=("the passport had expired", "flights were delayed by fog", "the high season was over"),
    ),
    Topic(
        who=("a history teacher", "the first-year students", "a librarian", "the examination board"),
        did=("explained", "memorised", "marked", "argued about", "translated"),
        what=("the causes of the war", "a chapter on algebra", "sixty essays", "the Latin inscription"),
        why=("the exam was two days away", "the textbook contradicted itself", "curiosity won"),
    ),
    Topic(
        who=("the plumber", "a careful gardener", "my upstairs neighbour", "the carpenter"),
        did=("repaired", "painted", "tore down", "measured twice and cut", "planted"),
        what=("the leaking kitchen tap", "a row of tomato plants", "the garden fence", "an oak bookshelf"),
        why=("the landlord would not", "guests were coming on Sunday", "the wood had rotted"),
    ),
)

FORMS: Final = (
    "{who} {did} {what}.",
    "{who} {did} {what} because {why}.",
    "Did {who} really say that {why}?",
    "Although {why}, {who} {did} {what} last {day}.",
    "{why}, and so {who} {did} {what}.",
    "Please tell me who {did} {what}.",
    "According to the report, {who} {did} {what} at least {count} times before {why}.",
    '"I never believed that {why}," said {who}.',
    "What happened to {what}?",
    "On {day}, {count} people saw how {who} {did} {what}, yet {other} only wondered whether {why}.",
    "{what}: {count} reasons to care.",
    "It was not {who} but {other} who {did} {what}.",
)

RETRIEVAL, CALIBRATION = 200, 128
DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def retrieval_sentences() -> list[str]:
    """Return 200 sentences that are searched and searched for, all different."""
    return _pool()[:RETRIEVAL]


def calibration_sentences() -> list[str]:
    """Return 128 others."""
    return _pool()[RETRIEVAL:]


def _pool() -> list[str]:
    generator, found = random.Random(20), dict[str, None]()
    while len(found) < RETRIEVAL + CALIBRATION:
        found[_sentence(generator)] = None
    return list(found)


def _sentence(generator: random.Random) -> str:
    topic = generator.choice(TOPICS)
    words = {name: generator.choice(getattr(topic, name)) for name in ("who", "did", "what", "why")}
    other = generator.choice([name for name in topic.who if name != words["who"]])
    form = generator.choice(FORMS)
    text = form.format(**words, other=other, day=generator.choice(DAYS), count=generator.randint(2, 900))
    return text[0].upper() + text[1:]
