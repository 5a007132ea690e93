"""Tokenizing captions: clipmb.CLIPTokenizerFast beside CLIPTokenizerFast of transformers 4.

Both have the same vocabulary and use their defaults for threads. Every timed run gets captions that neither has seen,
from the same seeded generator; the ids must be equal.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

from _compare import compare, row

import clipmb

COUNT = 20_000
ROUNDS = 5
_SUBJECTS = [
    "man",
    "woman",
    "child",
    "dog",
    "cat",
    "horse",
    "bird",
    "bus",
    "train",
    "plane",
    "boat",
    "pizza",
    "sandwich",
    "bicycle",
    "motorcycle",
    "giraffe",
    "zebra",
]
_DETAILS = [
    "small",
    "large",
    "old",
    "young",
    "wooden",
    "red",
    "blue",
    "black-and-white",
    "vintage",
    "modern",
    "snowy",
    "crowded",
    "rainy",
    "sunlit",
    "blurry",
    "colorful",
    "striped",
    "empty",
    "broken",
    "shiny",
    "handmade",
    "traditional",
    "giant",
    "tiny",
    "hand-painted",
    "grey",
    "brown",
    "orange-and-white",
]
_ACTIONS = [
    "sitting",
    "standing",
    "running",
    "jumping",
    "sleeping",
    "flying",
    "parked",
    "looking",
    "eating",
    "playing",
    "waiting",
    "posing",
    "riding",
]
_PLACES = [
    "table",
    "street",
    "beach",
    "field",
    "kitchen",
    "mountain",
    "river",
    "station",
    "park",
    "bridge",
    "window",
    "garden",
    "market",
    "stadium",
    "forest",
]
_FRAMES = (
    "A {d} {s} {a} near the {p}.", "a photo of a {d} {s}, {a} on a {p}", "Two {s}s {a} in the {p} with {n} people",
    "{x}'s {s} {a} at the {p} in {y}", "close-up of {d} {s} | {x} Photography #{n}",
    "The {s} isn't {a}; it's on the {p}!",
    "{x} {z} and a {d} {s} by the {d} {p} (© {y})", "\"{s}\" by {x} {z}, {y}, oil on canvas, {n} x {n} cm",
    "Vintage {y} {d} {s} {p} stock photo ID {n}{n}", "café {p} with {d} {s} 😀 in {x}ville",
)  # fmt: skip
_SYLLABLES = [
    "an",
    "ber",
    "cor",
    "da",
    "el",
    "fin",
    "gar",
    "hol",
    "is",
    "jo",
    "ka",
    "lum",
    "mar",
    "nor",
    "os",
    "pet",
    "qui",
    "ros",
    "san",
    "ter",
    "ul",
    "ven",
    "wil",
    "yor",
    "zan",
]


def captions(count: int, seed: int) -> list[str]:
    """Makes captions of about 10 words; their names come from 30,000 made-up ones, as often as in real text (Zipf)."""
    draw = random.Random(0)
    names = ["".join(draw.choices(_SYLLABLES, k=draw.randint(2, 4))).capitalize() for _ in range(30_000)]
    chances = list(itertools.accumulate(1 / rank for rank in range(1, len(names) + 1)))
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        frame = draw.choice(_FRAMES)
        first, last = draw.choices(names, cum_weights=chances, k=2)
        fields = {"s": _SUBJECTS, "d": _DETAILS, "a": _ACTIONS, "p": _PLACES}
        chosen = {key: draw.choice(words) for key, words in fields.items()}
        number = draw.randint(1, 20) if draw.random() < 0.9 else draw.randint(1, 9999)
        made.append(frame.format(**chosen, n=number, y=draw.randint(1990, 2025), x=first, z=last))
    return made


def transformers_4(ours: clipmb.CLIPTokenizerFast, name: str) -> Callable:
    """Builds a tokenizer of transformers 4 from the same vocab.json and merges.txt."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        return getattr(transformers, name)(*ours.save_vocabulary(folder))


def main() -> None:
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    ours = clipmb.CLIPTokenizerFast()
    row("construction", clipmb=f"{1000 * (time.perf_counter() - start):.1f} ms")
    theirs = transformers_4(ours, "CLIPTokenizerFast")

    batches = [captions(COUNT, seed) for seed in range(ROUNDS + 1)]
    for batch in batches[:2]:
        if ours(batch)["input_ids"] != theirs(batch)["input_ids"]:
            raise SystemExit("The ids differ, so that the times mean nothing.")

    def unseen(tokenize: Callable) -> Callable[[], object]:
        turn = itertools.cycle(batches)
        return lambda: tokenize(next(turn))

    ours._engine.clear_caches()
    compare(
        "batch of unseen captions, lists",
        unseen(ours),
        unseen(theirs),
        count=COUNT,
        unit="captions",
        rounds=ROUNDS,
        goal=8,
    )
    same = batches[0]
    compare(
        "the same captions again", lambda: ours(same), lambda: theirs(same), count=COUNT, unit="captions", rounds=ROUNDS
    )
    fixed = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "np"}
    compare(
        "padded to 77, numpy", unseen(lambda texts: ours(texts, **fixed)), unseen(lambda texts: theirs(texts, **fixed)),
        count=COUNT, unit="captions", rounds=ROUNDS,
    )  # fmt: skip
    if importlib.util.find_spec("instant_clip_tokenizer"):
        from instant_clip_tokenizer import Tokenizer

        instant = Tokenizer()
        compare(
            "padded to 77, numpy", unseen(lambda texts: ours(texts, **fixed)),
            unseen(lambda texts: instant.tokenize_batch(texts, context_length=77)), count=COUNT, unit="captions",
            rounds=ROUNDS, peer="instant-clip-tokenizer",
        )  # fmt: skip
    plain, slow, some = clipmb.CLIPTokenizer(), transformers_4(ours, "CLIPTokenizer"), batches[2][: COUNT // 10]
    compare(
        "CLIPTokenizer, lists", lambda: plain(some), lambda: slow(some), count=len(some), unit="captions", rounds=3,
        peer="transformers, slow",
    )  # fmt: skip

    def cold() -> None:
        ours._engine.clear_caches()
        ours(same)

    compare("with empty caches", cold, lambda: theirs(same), count=COUNT, unit="captions", rounds=ROUNDS)
    few = same[:500]
    compare(
        "one caption a call", lambda: [ours(text) for text in few], lambda: [theirs(text) for text in few],
        count=len(few), unit="captions", rounds=ROUNDS,
    )  # fmt: skip
    taken = []
    for text in few:
        start = time.perf_counter()
        ours(text)
        taken.append(time.perf_counter() - start)
    row("one caption, median latency", clipmb=f"{1e6 * statistics.median(taken):.0f} µs")


if __name__ == "__main__":
    main()
