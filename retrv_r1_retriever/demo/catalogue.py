"""The demo catalogue: procedural product cards with M-BEIR-format files, made from nothing but Pillow and a seed.

A card shows coarse attributes (count, colour, shape, pattern, frame) that two compressed tokens can carry, and a printed code that
they lose and an inspection reveals. Two strata of equal size (docs/design-decisions.md):

coarse  the combination of attributes is unique in its pool: comparing attributes decides
fine    three cards share the combination and differ in their code: only reading the code decides

Combinations of the validation and test pools never occur in training. Layout, as in M-BEIR:

    cand_pool/local/mbeir_cards_<split>_cand_pool.jsonl     images (modality "image") and their texts ("text")
    query/<split>/mbeir_cards_<task>_<split>.jsonl          task: t2i, i2t, cir
    qrels/<split>/mbeir_cards_<task>_<split>_qrels.txt
    instructions/query_instructions.tsv
    mbeir_images/<split>/*.png
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retrv_r1_retriever.types import Query

COLOURS = {
    "red": (214, 48, 49), "green": (46, 160, 67), "blue": (52, 92, 214), "yellow": (236, 196, 36),
    "purple": (142, 68, 173), "cyan": (38, 184, 200), "orange": (240, 130, 32), "black": (28, 28, 30),
}  # fmt: skip
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "count": ("one", "two", "three"),
    "colour": tuple(COLOURS),
    "shape": ("circle", "square", "triangle", "cross", "ring", "diamond"),
    "pattern": ("plain", "stripes", "bars", "dots", "checks"),
    "frame": ("bare", "thin", "thick", "dashed"),
}
DIGITS = "0123456789"
SIZE = 64  # pixels per side
STRIP = 43  # the code is printed below this row
TASKS = {
    "t2i": "Find the card for this text.",
    "i2t": "Find the text for this card.",
    "cir": "Find the card after this change.",
}
DATASET_ID = 90  # M-BEIR ids are "<dataset>:<number>"; 90 is unused there


@dataclass(frozen=True, slots=True)
class Card:
    """attributes in the order of `ATTRIBUTES`; code: three digits."""

    attributes: tuple[str, ...]
    code: str

    @property
    def coarse_text(self) -> str:
        return " ".join(self.attributes)

    @property
    def code_text(self) -> str:
        """`a4 b7 c1`: position and digit in one word, so that comparing two codes compares words."""
        return " ".join(f"{slot}{digit}" for slot, digit in zip("abc", self.code, strict=True))

    @property
    def text(self) -> str:
        return f"{self.coarse_text} {self.code_text}"


@dataclass(frozen=True, slots=True)
class Split:
    """combos: which share of the attribute combinations; queries: per task and stratum."""

    name: str
    combos: str
    seed: int
    queries: int


#: Three training pools show the same combinations with other codes and siblings, so codes cannot be learned by heart.
SPLITS = {
    "train0": Split("train0", "train", 11, 900),
    "train1": Split("train1", "train", 12, 900),
    "train2": Split("train2", "train", 13, 900),
    "val": Split("val", "val", 21, 150),
    "test": Split("test", "test", 31, 300),
}
_SHARES = {"train": 0.60, "val": 0.15, "test": 0.25}


@cache
def combos(part: str) -> tuple[tuple[str, ...], ...]:
    """Attribute combinations of one part; the three parts are disjoint and together all 2,880."""
    everything = list(itertools.product(*ATTRIBUTES.values()))
    random.Random(0).shuffle(everything)
    start = 0
    for name, share in _SHARES.items():
        size = round(share * len(everything))
        if name == part:
            return tuple(everything[start : start + size])
        start += size
    raise KeyError(part)


def make_cards(split: Split) -> list[tuple[Card, str]]:
    """(card, stratum) of one pool: every second combination is coarse (one card), the others fine (three siblings)."""
    rng = random.Random(split.seed)
    chosen = list(combos(split.combos))
    rng.shuffle(chosen)
    cards: list[tuple[Card, str]] = []
    for number, attributes in enumerate(chosen):
        code = _random_code(rng)
        if number % 2 == 0:
            cards.append((Card(attributes, code), "coarse"))
            continue
        codes = [code]
        while len(codes) < 3:
            sibling = _near_code(code, rng) if rng.random() < 0.7 else _random_code(rng)
            if sibling not in codes:
                codes.append(sibling)
        rng.shuffle(codes)
        cards += [(Card(attributes, c), "fine") for c in codes]
    return cards


def make_queries(split: Split, cards: list[tuple[Card, str]]) -> Iterator[dict[str, Any]]:
    """Query specs: task, stratum, target number, text, and the card to render as the query's picture (or None)."""
    rng = random.Random(split.seed + 1)
    for task, stratum in itertools.product(TASKS, ("coarse", "fine")):
        numbers = [i for i, (_, s) in enumerate(cards) if s == stratum]
        picks = [n for _ in range(-(-split.queries // len(numbers))) for n in rng.sample(numbers, len(numbers))]
        for number in picks[: split.queries]:
            card = cards[number][0]
            text, picture = None, None
            if task == "t2i":
                text = card.text if stratum == "fine" else card.coarse_text
            elif task == "i2t":
                picture = card
            else:
                picture, text = _edit(card, rng)
            yield {"task": task, "stratum": stratum, "target": number, "text": text, "picture": picture}


def render(card: Card, rng: random.Random) -> Image.Image:
    """Draw a card, (SIZE, SIZE) RGB. Positions, sizes and pattern phases vary with `rng`: two renderings never agree."""
    count, colour, shape, pattern, frame = card.attributes
    picture = Image.new("RGB", (SIZE, SIZE), (232, 230, 224))
    draw = ImageDraw.Draw(picture)
    _draw_pattern(draw, pattern, rng)
    number = ATTRIBUTES["count"].index(count) + 1
    for x in rng.sample((11, 31, 51), number):
        radius = rng.choice((8, 9, 10)) if number < 3 else rng.choice((7, 8))
        _draw_shape(draw, shape, x + rng.randint(-2, 2), 22 + rng.randint(-6, 6), radius, COLOURS[colour])
    draw.rectangle((0, STRIP, SIZE, SIZE), fill=(252, 252, 250))
    _draw_code(picture, card.code, rng)
    _draw_frame(draw, frame)
    return picture


def write_catalogue(
    root: Path, splits: tuple[str, ...] = ("test",), progress: Callable[[str, int, int], None] | None = None
) -> Path:
    """Write pools, queries, qrels and pictures below `root`; splits already complete are left alone.

    progress: called with (what, done, total).
    """
    for name in splits:
        split = SPLITS[name]
        done = root / f".{name}.complete"
        if not done.exists():
            _write_split(root, split, progress)
            done.write_text(f"seed {split.seed}\n")
    tsv = root / "instructions" / "query_instructions.tsv"
    tsv.parent.mkdir(parents=True, exist_ok=True)
    shapes = {"t2i": "text\timage", "i2t": "image\ttext", "cir": "image,text\timage"}
    rows = (f"{shapes[task]}\tcards\t{DATASET_ID}\t{text}\n" for task, text in TASKS.items())
    tsv.write_text("query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n" + "".join(rows))
    return root


@dataclass(frozen=True, slots=True)
class LabelledQuery:
    """A query with its answers. `target_text` is the right card in words (for teachers and pages, never for the model)."""

    query: Query
    task: str
    stratum: str
    positives: tuple[str, ...]
    target_modality: str
    target_text: str


def read_queries(root: Path, split: str, task: str) -> list[LabelledQuery]:
    """Queries of one task; pictures as paths relative to `root`."""
    rows = _read_jsonl(root / "query" / split / f"mbeir_cards_{task}_{split}.jsonl")
    queries = []
    for row in rows:
        extra = json.loads(row["query_src_content"])
        query = Query.of(row["query_txt"], row["query_img_path"], TASKS[task], row["qid"])
        modality = "text" if task == "i2t" else "image"
        positives = tuple(row["pos_cand_list"])
        queries.append(LabelledQuery(query, task, extra["stratum"], positives, modality, extra["target"]))
    return queries


def pool_path(root: Path, split: str) -> Path:
    return root / "cand_pool" / "local" / f"mbeir_cards_{split}_cand_pool.jsonl"


def _write_split(root: Path, split: Split, progress: Callable[[str, int, int], None] | None) -> None:
    rng = random.Random(split.seed + 2)
    cards = make_cards(split)
    specs = list(make_queries(split, cards))
    folder = root / "mbeir_images" / split.name
    folder.mkdir(parents=True, exist_ok=True)
    total = len(cards) + sum(spec["picture"] is not None for spec in specs)
    written = 0

    def save(card: Card, stem: str) -> str:
        nonlocal written
        path = folder / f"{stem}.png"
        render(card, rng).save(path, compress_level=1)
        written += 1
        if progress and (written % 200 == 0 or written == total):
            progress(f"cards ({split.name})", written, total)
        return path.relative_to(root).as_posix()

    base = split.seed * 100_000
    pool = []
    for number, (card, stratum) in enumerate(cards):
        source = json.dumps({"stratum": stratum, "caption": card.text})
        image = {"did": f"{DATASET_ID}:{base + number}", "txt": None, "img_path": save(card, f"card{number:05}")}
        text = {"did": f"{DATASET_ID}:{base + 50_000 + number}", "txt": card.text, "img_path": None}
        pool += [
            {**image, "modality": "image", "src_content": source},
            {**text, "modality": "text", "src_content": source},
        ]
    _write_jsonl(pool_path(root, split.name), pool)
    by_task: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for number, spec in enumerate(specs):
        picture = save(spec["picture"], f"query{number:05}") if spec["picture"] else None
        by_task[spec["task"]].append(_query_row(spec, number, base, picture, cards[spec["target"]][0]))
    for task, rows in by_task.items():
        _write_jsonl(root / "query" / split.name / f"mbeir_cards_{task}_{split.name}.jsonl", rows)
        qrels = root / "qrels" / split.name / f"mbeir_cards_{task}_{split.name}_qrels.txt"
        qrels.parent.mkdir(parents=True, exist_ok=True)
        qrels.write_text("".join(f"{r['qid']} 0 {r['pos_cand_list'][0]} 1 {r['task_id']}\n" for r in rows))


def _query_row(spec: dict[str, Any], number: int, base: int, picture: str | None, target: Card) -> dict[str, Any]:
    task_ids = {"t2i": 0, "i2t": 3, "cir": 7}  # M-BEIR's numbering of these task shapes
    modality = "image,text" if picture and spec["text"] else "image" if picture else "text"
    positive = base + spec["target"] + (50_000 if spec["task"] == "i2t" else 0)
    return {
        "qid": f"{DATASET_ID}:{base + number}",
        "query_txt": spec["text"],
        "query_img_path": picture,
        "query_modality": modality,
        "query_src_content": json.dumps({"stratum": spec["stratum"], "target": target.text}),
        "pos_cand_list": [f"{DATASET_ID}:{positive}"],
        "neg_cand_list": [],
        "task_id": task_ids[spec["task"]],
    }


def _edit(card: Card, rng: random.Random) -> tuple[Card, str]:
    """A reference card that becomes `card` by the returned words; the code stays."""
    changed = sorted(rng.sample(range(len(ATTRIBUTES)), rng.choice((1, 2))))
    attributes = list(card.attributes)
    for position, values in enumerate(ATTRIBUTES.values()):
        if position in changed:
            attributes[position] = rng.choice([v for v in values if v != card.attributes[position]])
    return replace(card, attributes=tuple(attributes)), "but " + " ".join(card.attributes[i] for i in changed)


def _random_code(rng: random.Random) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(3))


def _near_code(code: str, rng: random.Random) -> str:
    digits, position = list(code), rng.randrange(3)
    digits[position] = rng.choice([d for d in DIGITS if d != digits[position]])
    return "".join(digits)


def _draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, rng: random.Random) -> None:
    shade, phase = (196, 192, 184), rng.randrange(8)
    if pattern == "stripes":
        for y in range(phase - 8, STRIP, 8):
            draw.rectangle((0, y, SIZE, y + 3), fill=shade)
    elif pattern == "bars":
        for x in range(phase - 8, SIZE, 8):
            draw.rectangle((x, 0, x + 3, STRIP), fill=shade)
    elif pattern == "dots":
        for y in range(phase // 2, STRIP, 8):
            for x in range(phase - 8, SIZE, 8):
                draw.ellipse((x, y, x + 3, y + 3), fill=(150, 146, 138))
    elif pattern == "checks":
        for y in range(0, STRIP, 8):
            for x in range(0, SIZE, 8):
                if (x // 8 + y // 8) % 2:
                    draw.rectangle((x, y, x + 7, y + 7), fill=shade)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif shape == "cross":
        draw.rectangle((x - r, y - 2, x + r, y + 2), fill=fill)
        draw.rectangle((x - 2, y - r, x + 2, y + r), fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=3)
    else:  # diamond
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)


def _draw_frame(draw: ImageDraw.ImageDraw, frame: str) -> None:
    ink, edge = (70, 70, 76), SIZE - 1
    if frame == "thin":
        draw.rectangle((0, 0, edge, edge), outline=ink, width=1)
    elif frame == "thick":
        draw.rectangle((0, 0, edge, edge), outline=ink, width=4)
    elif frame == "dashed":
        for start in range(0, SIZE, 8):
            draw.rectangle((start, 0, start + 3, 2), fill=ink)
            draw.rectangle((start, edge - 2, start + 3, edge), fill=ink)
            draw.rectangle((0, start, 2, start + 3), fill=ink)
            draw.rectangle((edge - 2, start, edge, start + 3), fill=ink)


@cache
def _glyph(digit: str) -> np.ndarray:
    """A digit of Pillow's built-in bitmap font, cropped and doubled: (h, w) bool."""
    canvas = Image.new("L", (6, 11), 0)
    ImageDraw.Draw(canvas).text((0, 0), digit, font=ImageFont.load_default_imagefont(), fill=255)
    ink = np.asarray(canvas) > 127
    rows, columns = np.where(ink.any(1))[0], np.where(ink.any(0))[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].repeat(2, 0).repeat(2, 1)


def _draw_code(picture: Image.Image, code: str, rng: random.Random) -> None:
    left, top = 7 + rng.randint(0, 4), STRIP + 2 + rng.randint(0, 1)
    for position, digit in enumerate(code):
        mask = Image.fromarray((_glyph(digit) * 255).astype(np.uint8))
        picture.paste((16, 16, 18), (left + 17 * position, top), mask)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
