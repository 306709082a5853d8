#!/usr/bin/env python3
"""Write the quick-start dataset: plain-English requests in, one strict JSON command out.

The task
    A user asks a home/office assistant for one thing ("hey, dim the attic to forty
    percent"). The only right answer is one line of JSON with fixed keys in a fixed order:

        {"action": "set_light", "room": "attic", "brightness": 40}

    There are eight actions (see KEYS). Every value is either copied from the request or
    normalised in a simple way: number words become numbers, clock times become 24-hour
    "HH:MM", days become lower case.

The data
    The sentence frames and the words that fill them are written by hand and live in
    recipes/data/commands.frames.json. This script fills the frames with a seeded generator
    and writes commands.train.jsonl and commands.heldout.jsonl. The held-out frames, names,
    artists, rooms, labels, lists, items and message texts never occur in the training file;
    `validate` refuses to go on if they do. Numbers, days and times are shared.

Usage
    python scripts/make_quickstart_data.py            write the two files
    python scripts/make_quickstart_data.py --check    exit 1 if the files on disk differ

Only the standard library is used, and randomness comes from `random.Random.random()` alone,
whose sequence for a given seed is the same in every Python version.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

DATA_DIR = Path(__file__).resolve().parent.parent / "recipes" / "data"
FRAMES_FILE = DATA_DIR / "commands.frames.json"
SEED = 20240229
TRAIN_ROWS = 92  # for each action,
TRAIN_ROWS_WITH_TIME = 124  # but more where a clock time must be understood
LEAD_IN_SHARE = 0.25
TRAILER_SHARE = 0.15
CASUAL_SHARE = 0.2  # requests that start with a small letter

# The keys of each action, in the order in which they are written.
KEYS: dict[str, tuple[str, ...]] = {
    "set_timer": ("minutes", "label"),
    "set_alarm": ("time", "days"),
    "send_message": ("to", "text"),
    "set_light": ("room", "brightness"),
    "add_to_list": ("list", "item"),
    "play_music": ("artist", "room"),
    "schedule_meeting": ("with", "day", "time"),
    "set_temperature": ("room", "celsius"),
}

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ALARM_DAYS = (*WEEKDAYS, "tomorrow", "tomorrow", "weekdays", "weekends", "every day")
ALARM_HOURS = (4, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 9, 10, 11, 13, 14, 15, 17, 19, 20, 21)
MEETING_DAYS = (*WEEKDAYS, "tomorrow", "tomorrow")
MEETING_HOURS = tuple(range(8, 20))
# Where "a" becomes "an" before a number: 8, 11, 18 and 80 start with a vowel sound.
A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=(8|11|18|eight|eleven)\b|(80|eighteen|eighty))")
# Durations said in another way: words, words before a noun, minutes.
SPOKEN_DURATIONS = (
    ("a quarter of an hour", "quarter-hour", 15),
    ("half an hour", "half-hour", 30),
    ("an hour", "one-hour", 60),
    ("one hour", "one-hour", 60),
    ("an hour and a half", "90-minute", 90),
    ("two hours", "two-hour", 120),
    ("three hours", "three-hour", 180),
)


def number_words(number: int) -> str:
    """Spell 0 to 99: 42 -> 'forty two'."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] if ones == 0 else f"{TENS[tens]} {ONES[ones]}"


class Draw:
    """Seeded choices built on `random()` only, so that every Python version agrees."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(sum(ord(c) * 31**i for i, c in enumerate(seed)))
        self._decks: dict[str, list[int]] = {}

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def below(self, stop: int) -> int:
        return int(self._random.random() * stop)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        order = sorted((self._random.random(), index) for index in range(len(options)))
        return [options[index] for _, index in order]

    def deal(self, name: str, options: Sequence[T]) -> T:
        """Draw from a shuffled deck, so that every option is used before any comes again."""
        if not self._decks.get(name):
            self._decks[name] = list(self.shuffled(range(len(options))))
        return options[self._decks[name].pop()]


@dataclass(frozen=True)
class Filled:
    """What the draw for one action gave: the words for each slot, and the JSON values."""

    words: dict[str, str]
    values: dict[str, str | int]
    proper: frozenset[str] = frozenset()  # slots whose first letter is never changed


@dataclass(frozen=True)
class Frame:
    text: str
    fixed: dict[str, int]

    @property
    def key(self) -> str:
        """The frame without case and punctuation, to compare frames with one another."""
        return " ".join(re.findall(r"[a-z_{}']+", self.text.lower()))


Pools = dict[str, Any]


def draw_duration(draw: Draw) -> tuple[str, str, int]:
    if draw.chance(0.18):
        return draw.deal("spoken_duration", SPOKEN_DURATIONS)
    minutes = draw.deal("minutes", tuple(range(2, 61)) + (75, 80, 90))
    if draw.chance(0.4):
        word = number_words(minutes)
        return f"{word} minutes", f"{word.replace(' ', '-')}-minute", minutes
    unit = "min" if draw.chance(0.15) else "minutes"
    return f"{minutes} {unit}", f"{minutes}-minute", minutes


def draw_time(draw: Draw, hours: Sequence[int]) -> tuple[str, str]:
    """Return how the time is said and its 24-hour value."""
    hour = draw.deal(f"hour{hours}", hours)
    minute = draw.pick((0, 0, 15, 30, 30, 45, 5 * draw.below(12)))
    value = f"{hour:02d}:{minute:02d}"
    part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    twelve = (hour - 1) % 12 + 1
    style = draw.below(10)
    if style < 5:
        return value, value
    if style < 9 or minute not in (0, 15, 30):
        clock = f"{twelve}:{minute:02d}" if minute else str(twelve)
        return f"{clock} {'am' if hour < 12 else 'pm'}", value
    spoken = {0: "", 15: "quarter past ", 30: "half past "}[minute] + ONES[twelve]
    return f"{spoken} in the {part}", value


def fill_timer(draw: Draw, pools: Pools) -> Filled:
    words, adjective, minutes = draw_duration(draw)
    label = draw.deal("label", pools["label"])
    return Filled(
        {"dur": words, "dur_adj": adjective, "label": label},
        {"minutes": minutes, "label": label},
    )


def fill_alarm(draw: Draw, _pools: Pools) -> Filled:
    said, time = draw_time(draw, ALARM_HOURS)
    day = draw.deal("alarm_day", ALARM_DAYS)
    on = day if day in ("tomorrow", "every day") else f"on {day}"
    return Filled({"time": said, "alarm_day": day, "alarm_on": on}, {"time": time, "days": day.lower()})


def fill_message(draw: Draw, pools: Pools) -> Filled:
    who, text = draw.deal("who", pools["who"]), draw.deal("text", pools["text"])
    return Filled({"who": who, "text": text}, {"to": who, "text": text}, frozenset({"who", "text"}))


def fill_light(draw: Draw, pools: Pools) -> Filled:
    room = draw.deal("room", pools["room"])
    level = draw.deal("level", tuple(range(5, 96, 5)) + (12, 18, 33, 42, 64, 72, 88))
    style = draw.below(10)
    number = number_words(level) if style < 6 else str(level)
    said = f"{level}%" if style < 3 else f"{number} percent"
    return Filled({"room": room, "level": said}, {"room": room, "brightness": level})


def fill_list(draw: Draw, pools: Pools) -> Filled:
    pairs = [(group, item) for group in pools["list_groups"] for item in group["items"]]
    group, item = draw.deal("item", pairs)
    name = draw.deal(f"list {group['lists'][0]}", group["lists"])
    return Filled({"list": name, "item": item}, {"list": name, "item": item})


def fill_music(draw: Draw, pools: Pools) -> Filled:
    artist, room = draw.deal("artist", pools["artist"]), draw.deal("room", pools["room"])
    return Filled({"artist": artist, "room": room}, {"artist": artist, "room": room}, frozenset({"artist"}))


def fill_meeting(draw: Draw, pools: Pools) -> Filled:
    who = draw.deal("who", pools["who"])
    day = draw.deal("day", MEETING_DAYS)
    said, time = draw_time(draw, MEETING_HOURS)
    return Filled(
        {"who": who, "day": day, "on": day if day == "tomorrow" else f"on {day}", "time": said},
        {"with": who, "day": day.lower(), "time": time},
        frozenset({"who"}),
    )


def fill_temperature(draw: Draw, pools: Pools) -> Filled:
    room, celsius = draw.deal("room", pools["room"]), draw.deal("celsius", tuple(range(14, 29)))
    style = draw.below(10)
    number = number_words(celsius) if style < 5 else str(celsius)
    said = f"{celsius}°C" if style < 2 else f"{number} degrees"
    return Filled({"room": room, "temp": said}, {"room": room, "celsius": celsius})


FILLERS: dict[str, Callable[[Draw, Pools], Filled]] = {
    "set_timer": fill_timer,
    "set_alarm": fill_alarm,
    "send_message": fill_message,
    "set_light": fill_light,
    "add_to_list": fill_list,
    "play_music": fill_music,
    "schedule_meeting": fill_meeting,
    "set_temperature": fill_temperature,
}


def starts_with_name(frame: str, filled: Filled) -> bool:
    slot = re.match(r"\{(\w+)\}", frame)
    return bool(slot and (slot[1] in filled.proper or filled.words[slot[1]] in WEEKDAYS))


def with_small_start(frame: str, sentence: str, filled: Filled) -> str:
    """Lower the first letter unless it belongs to a name, to 'I' or to an abbreviation."""
    if starts_with_name(frame, filled) or re.match(r"I\b|[A-Z]{2}", sentence):
        return sentence
    return sentence[0].lower() + sentence[1:]


def write_request(draw: Draw, frame: Frame, filled: Filled, extras: dict[str, list[str]]) -> str:
    """Fill a frame and vary its start and end. `extras` is empty for held-out rows."""
    text = frame.text
    sentence = text.format(**filled.words)
    sentence = A_BEFORE_VOWEL.sub(r"\1n ", sentence)
    sentence = re.sub(r"[.?] [a-z]", lambda match: match[0].upper(), sentence)
    open_ended = not text.endswith(("?", '"', "{text}"))
    polite = re.search(r"please|would|could|can you", text, re.IGNORECASE)
    if extras and open_ended and not polite and draw.chance(TRAILER_SHARE):
        sentence += draw.pick(extras["trailers"])
    if open_ended and draw.chance(0.4):
        sentence += "."
    if extras and draw.chance(LEAD_IN_SHARE):
        lead = draw.deal("lead_in", extras["lead_ins"])
        sentence = lead + with_small_start(text, sentence, filled)
        return sentence[0].upper() + sentence[1:] if draw.chance(0.5) else sentence
    if extras and draw.chance(CASUAL_SHARE):
        return with_small_start(text, sentence, filled)
    if starts_with_name(text, filled):
        return sentence
    return sentence[0].upper() + sentence[1:]


def read_frames(source: dict[str, Any], action: str, split: str) -> list[Frame]:
    frames = []
    for entry in source["actions"][action][split]:
        if isinstance(entry, str):
            frames.append(Frame(entry, {}))
        else:
            frames.append(Frame(entry["frame"], {k: v for k, v in entry.items() if k != "frame"}))
    return frames


def make_rows(source: dict[str, Any], split: str) -> list[str]:
    """Make the JSON lines of one split: frames in turn, so that none is used too often."""
    extras = {k: source[k] for k in ("lead_ins", "trailers")} if split == "train" else {}
    pools = source["pools"][split]
    rows: list[str] = []
    seen: set[str] = set()
    for action, keys in KEYS.items():
        draw = Draw(f"{SEED}/{split}/{action}")
        frames = read_frames(source, action, split)
        wanted = len(frames)
        if split == "train":
            wanted = TRAIN_ROWS_WITH_TIME if "time" in keys else TRAIN_ROWS
        made = 0
        while made < wanted:
            frame = draw.deal("frame", frames)
            while True:
                filled = FILLERS[action](draw, pools)
                request = write_request(draw, frame, filled, extras)
                bare = re.sub(r"[^a-z0-9 ]", "", request.lower())
                if bare not in seen:
                    break
            seen.add(bare)
            made += 1
            values = {**filled.values, **frame.fixed}
            command = {"action": action} | {key: values[key] for key in keys}
            messages = [
                {"role": "user", "content": request},
                {"role": "assistant", "content": json.dumps(command, ensure_ascii=False)},
            ]
            rows.append(json.dumps({"messages": messages}, ensure_ascii=False))
    return Draw(f"{SEED}/{split}/order").shuffled(rows)


def vocabulary(pools: Pools, name: str) -> set[str]:
    if name in ("lists", "items"):
        return {word.lower() for group in pools["list_groups"] for word in group[name]}
    return {word.lower() for word in pools[name]}


def validate(source: dict[str, Any]) -> None:
    """Stop if a frame or a word is shared by the two splits, or a frame is listed twice."""
    for action in KEYS:
        keys = [f.key for split in ("train", "heldout") for f in read_frames(source, action, split)]
        if len(keys) != len(set(keys)):
            raise SystemExit(f"{action}: a frame is listed twice or is in both splits")
    for name in ("who", "artist", "room", "label", "text", "lists", "items"):
        pools = source["pools"]
        shared = vocabulary(pools["train"], name) & vocabulary(pools["heldout"], name)
        if shared:
            raise SystemExit(f"{name}: in both splits: {sorted(shared)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the quick-start dataset.")
    parser.add_argument("out", nargs="?", type=Path, default=DATA_DIR, help="output folder")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(argv)

    source = json.loads(FRAMES_FILE.read_text(encoding="utf-8"))
    validate(source)
    stale = []
    for split in ("train", "heldout"):
        path = options.out / f"commands.{split}.jsonl"
        content = ("\n".join(make_rows(source, split)) + "\n").encode("utf-8")
        if options.check:
            if not path.is_file() or path.read_bytes() != content:
                stale.append(path)
        else:
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"{path.name}: {content.count(10)} rows")
    for path in stale:
        print(f"{path} is missing or differs from what this script makes", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
