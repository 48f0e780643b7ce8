"""Words in pictures: signs of a word or a number, and small documents with a title and a list.

Letters stand in slots of 16 pixels, so that a small tokenizer meets them in the same places again and again. The font
is the one that Pillow carries (Aileron); others are given by path. [`SignReader`] reads a picture back, whoever drew
it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .world import BACKGROUNDS, COLORS

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
# (height, width) in pixels of a sign with one line of up to 5 letters, and of a document of up to 4 lines of 3.
SIGN_SIZE, DOCUMENT_SIZE = (48, 80), (80, 48)
SLOT = 16
# Heights of a line in pixels: of a sign's, and of a document's.
_SIGN_LINE, _DOCUMENT_LINE = 32, 20
_FONT_SHARE = 0.98
MAX_LETTERS, MAX_ITEMS, MAX_ITEM_LETTERS = 5, 3, 3
# Of random signs, how many are documents.
DOCUMENT_SHARE = 0.25
_WORD_LIST = """
SUN SEA SKY DOG CAT COW PIG HEN ANT BEE OWL FOX BUS CAR VAN BOX BAG HAT CAP CUP POT PAN JAM PIE EGG NUT TEA ICE
RED BIG NEW OLD HOT WET DRY ONE TWO SIX TEN YES NOW OUT
TREE LEAF ROSE SEED RAIN SNOW WIND STAR MOON FIRE LAKE HILL ROAD PARK SHIP BOAT BIKE TAXI DOOR LAMP DESK BOOK
FISH FROG DUCK BEAR WOLF LION GOAT BIRD CAKE MILK RICE SOUP FOUR FIVE NINE ZERO BLUE PINK GOLD OPEN STOP EXIT
HOUSE TABLE CHAIR PLANT GRASS BEACH RIVER CLOUD STORM EARTH WATER BREAD APPLE LEMON GRAPE PIZZA SUGAR HONEY
HORSE SHEEP MOUSE TIGER ZEBRA SNAKE WHALE SHARK TRAIN TRUCK PLANE WHEEL CLOCK PHONE PAPER MUSIC QUIET HAPPY
GREEN BLACK WHITE SEVEN EIGHT HELLO WORLD
"""
WORDS = tuple(_WORD_LIST.split())


@dataclass(frozen=True)
class Sign:
    """What is written on a plain background.

    Attributes:
        text: A word or number of up to 5 of `ALPHABET`; the title of a document, of up to 3.
        color: Colour of the text, one of `COLORS`.
        background: One of `BACKGROUNDS`.
        items: Lines below the title, of up to 3 letters each, in black (white on black); a sign has none.

    Raises:
        ValueError: If it cannot be written so.
    """

    text: str
    color: str
    background: str = "white"
    items: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "items", tuple(self.items))
        if self.color not in COLORS or self.background not in BACKGROUNDS:
            raise ValueError(f"There is no {self.color!r} text on a {self.background!r} background.")
        longest = MAX_ITEM_LETTERS if self.items else MAX_LETTERS
        for line in (self.text, *self.items):
            if not 1 <= len(line) <= longest or set(line) - set(ALPHABET):
                raise ValueError(f"A line has 1 to {longest} capital letters or digits here, got {line!r}.")
        if len(self.items) > MAX_ITEMS:
            raise ValueError(f"A list has up to {MAX_ITEMS} items, got {len(self.items)}.")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of its picture."""
        return DOCUMENT_SIZE if self.items else SIGN_SIZE


def render_sign(sign: Sign, font: str | None = None) -> np.ndarray:
    """Picture of a sign: uint8 `(height, width, 3)`.

    Args:
        sign: What it says.
        font: Path of a TrueType font instead of Pillow's own.
    """
    height, width = sign.size
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = BACKGROUNDS[sign.background]
    if sign.items:
        ink = BACKGROUNDS["white" if sign.background == "black" else "black"]
        for number, line in enumerate((sign.text, *sign.items)):
            _write(
                picture, line, number * _DOCUMENT_LINE, 0, _DOCUMENT_LINE, ink if number else COLORS[sign.color], font
            )
    else:
        left = (width - len(sign.text) * SLOT) // (2 * 8) * 8
        _write(picture, sign.text, (height - _SIGN_LINE) // 2, left, _SIGN_LINE, COLORS[sign.color], font)
    return np.rint(picture).astype(np.uint8)


def _write(
    picture: np.ndarray, line: str, top: int, left: int, height: int, color: tuple[int, int, int], font: str | None
) -> None:
    for place, letter in enumerate(line):
        alpha = glyph(letter, height, font)[..., None]
        own = picture[top : top + height, left + place * SLOT : left + (place + 1) * SLOT]
        own += alpha * (np.array(color, np.float32) - own)


@lru_cache(maxsize=1024)
def glyph(letter: str, height: int, font: str | None = None) -> np.ndarray:
    """float32 coverage `(height, SLOT)` of a letter in the middle of its slot, narrowed where it is too wide."""
    size = height * _FONT_SHARE
    scale = 4
    face = ImageFont.load_default(size * scale) if font is None else ImageFont.truetype(font, round(size * scale))
    # Half a pixel of stroke all round, so that the letters survive at this size.
    stroke = scale // 2
    left, top, right, bottom = face.getbbox(letter, stroke_width=stroke)
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), letter, fill=255, font=face, stroke_width=stroke)
    # All letters of a line are as tall as an E, and stand on the same base.
    _, cap_top, _, cap_bottom = face.getbbox("E", stroke_width=stroke)
    widest = (SLOT - 2) * scale
    box = (min(ink.width, widest), min(ink.height, height * scale - 2))
    canvas = Image.new("L", (SLOT * scale, height * scale))
    y = (height * scale - (cap_bottom - cap_top)) // 2 + (top - cap_top)
    canvas.paste(ink.resize(box, Image.Resampling.BOX), ((canvas.width - box[0]) // 2, max(0, y)))
    coverage = np.asarray(canvas, np.float32).reshape(height, scale, SLOT, scale).mean((1, 3)) / 255
    coverage.flags.writeable = False
    return coverage


@dataclass(frozen=True)
class ReadSign:
    """What a picture says.

    Attributes:
        lines: The text of each line; `?` stands for a letter that is none.
        color: Of `COLORS` the nearest to the first line's ink; `None` where nothing is written.
        background: The background, or `None` if it is none of `BACKGROUNDS`.
    """

    lines: tuple[str, ...]
    color: str | None
    background: str | None

    @property
    def text(self) -> str:
        """The first line."""
        return self.lines[0] if self.lines else ""

    def shows(self, sign: Sign) -> bool:
        """Whether this is exactly the sign."""
        return (self.lines, self.color, self.background) == ((sign.text, *sign.items), sign.color, sign.background)


class SignReader:
    """Reads pictures of signs and documents.

    Args:
        font: The font they are written in, as in [`render_sign`].
        min_fit: Least correlation of a letter's ink with its template.
    """

    # A background may be so far off in each channel, and ink lies at least so far from it (RGB levels).
    _TOLERANCE, _LEAST_CONTRAST = 40, 60

    def __init__(self, font: str | None = None, min_fit: float = 0.8):
        self.font, self.min_fit = font, min_fit

    def read(self, image) -> ReadSign:
        """Read a picture of `SIGN_SIZE` (one line) or `DOCUMENT_SIZE` (up to four).

        Args:
            image: uint8 `(height, width, 3)` or a PIL image.

        Raises:
            ValueError: If the picture has another size.
        """
        picture = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, np.float32)
        size = picture.shape[:2]
        if size not in (SIGN_SIZE, DOCUMENT_SIZE):
            raise ValueError(f"A sign has {SIGN_SIZE} or {DOCUMENT_SIZE} pixels (height, width), got {size}.")
        paper = np.median(picture.reshape(-1, 3), axis=0)
        background = _nearest(paper, BACKGROUNDS)
        if np.abs(paper - BACKGROUNDS[background]).max() > self._TOLERANCE:
            return ReadSign((), None, None)
        if size == SIGN_SIZE:
            bands = [picture[(size[0] - _SIGN_LINE) // 2 :][:_SIGN_LINE]]
        else:
            bands = [picture[top : top + _DOCUMENT_LINE] for top in range(0, size[0], _DOCUMENT_LINE)]
        lines, color = [], None
        for band in bands:
            text, ink = self._read_line(band, paper, is_centred=size == SIGN_SIZE)
            if not text:
                break
            color = color or _nearest(ink, COLORS)
            lines.append(text)
        return ReadSign(tuple(lines), color, background)

    def _read_line(self, band: np.ndarray, paper: np.ndarray, is_centred: bool) -> tuple[str, np.ndarray | None]:
        """Text of a line, and the colour of its ink."""
        distance = np.linalg.norm(band - paper, axis=-1)
        if distance.max() < self._LEAST_CONTRAST:
            return "", None
        strokes = distance >= np.quantile(distance[distance > distance.max() / 2], 0.5)
        ink = np.median(band[strokes], axis=0)
        stroke = ink - paper
        coverage = np.clip((band - paper) @ stroke / (stroke @ stroke), 0, 1)
        best = ("", -1.0)
        slots = band.shape[1] // SLOT
        for number in range(1, slots + 1):
            left = (band.shape[1] - number * SLOT) // (2 * 8) * 8 if is_centred else 0
            inside = coverage[:, left : left + number * SLOT]
            outside = coverage.sum() - inside.sum()
            letters = [self._read_letter(inside[:, k * SLOT : (k + 1) * SLOT]) for k in range(number)]
            fit = sum(own for _, own in letters) / number - outside / max(coverage.sum(), 1e-6)
            if fit > best[1]:
                best = ("".join(letter for letter, _ in letters), fit)
        return _settle_zeros(best[0]), ink

    def _read_letter(self, coverage: np.ndarray) -> tuple[str, float]:
        """The likeliest letter and its correlation."""
        own = coverage - coverage.mean()
        norm = np.linalg.norm(own)
        if norm < 1e-3:
            return "?", 0.0
        names, templates = _templates(coverage.shape[0], self.font)
        fits = templates @ (own / norm).ravel()
        index = int(fits.argmax())
        return (names[index] if fits[index] >= self.min_fit else "?"), float(fits[index])


@lru_cache(maxsize=8)
def _templates(height: int, font: str | None) -> tuple[str, np.ndarray]:
    """Names, and unit vectors of the glyphs without their means `(letters, height * SLOT)`."""
    glyphs = np.stack([glyph(letter, height, font).ravel() for letter in ALPHABET])
    glyphs = glyphs - glyphs.mean(axis=1, keepdims=True)
    return ALPHABET, glyphs / np.linalg.norm(glyphs, axis=1, keepdims=True)


def _settle_zeros(text: str) -> str:
    """O and 0 look alike: among digits it is a 0, else an O."""
    others = [letter for letter in text if letter not in "O0?"]
    is_number = bool(others) and all(letter.isdigit() for letter in others)
    return text.replace("O", "0") if is_number else text.replace("0", "O")


def _nearest(color: np.ndarray, known: dict[str, tuple[int, int, int]]) -> str:
    return min(known, key=lambda name: float(np.linalg.norm(np.array(known[name]) - color)))


def draw_sign(rng: np.random.Generator, split: str = "train", document_share: float = DOCUMENT_SHARE) -> Sign:
    """A random sign of a split: `WORDS` belong to the test split (every fourth to validation), training has others.

    Training writes strings of letters and numbers that are not among `WORDS`.

    Raises:
        ValueError: If there is no such split.
    """
    held_out = {"validation": WORDS[::4], "test": tuple(word for word in WORDS if word not in WORDS[::4])}
    if split not in ("train", *held_out):
        raise ValueError(f'A split is one of "train", "validation", "test", got {split!r}.')

    def line(longest: int) -> str:
        if split != "train":
            fitting = [word for word in held_out[split] if len(word) <= longest]
            return fitting[rng.integers(len(fitting))]
        alphabet = "0123456789" if rng.random() < 0.15 else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        while True:
            length = int(rng.integers(min(2, longest), longest + 1))
            text = "".join(alphabet[place] for place in rng.integers(len(alphabet), size=length))
            # Zeros alone cannot be told from the letter.
            if text not in WORDS and set(text) != {"0"}:
                return text

    color, background = (tuple(known)[rng.integers(len(known))] for known in (COLORS, BACKGROUNDS))
    if rng.random() >= document_share:
        return Sign(line(MAX_LETTERS), color, background)
    items = tuple(line(MAX_ITEM_LETTERS) for _ in range(rng.integers(1, MAX_ITEMS + 1)))
    return Sign(line(MAX_ITEM_LETTERS), color, background, items)


def words_of_sign(sign: Sign, rng: np.random.Generator | None = None) -> str:
    """Words that ask for a sign: all of it, or where `rng` says so without its background."""
    where = "" if rng is not None and rng.random() < 0.4 else f" on a {sign.background} background"
    if sign.items:
        listed = ", ".join(f'"{item}"' for item in sign.items)
        return f'a list with the title "{sign.text}" in {sign.color} and the items {listed}{where}'
    return f'the word "{sign.text}" in {sign.color}{where}'


# Ways to ask for a word that no training data have: a reward alone can teach them.
FREE_PROMPTS = (
    'the word "{text}" in {color} on {background}',
    'a word "{text}" in {color} on a {background} background',
    'draw the word "{text}" in {color} on a {background} background',
)
# Ways that no reward asks in either.
UNTAUGHT_PROMPTS = (
    "the word '{text}' in {color} on a {background} background",
    "the word {text} in {color} on a {background} background",
    'the word "{text}" written in {color} on a {background} background',
)


def ask_freely(sign: Sign, rng: np.random.Generator, ways: tuple[str, ...] = FREE_PROMPTS) -> str:
    """Words that ask for a sign without a list in one of the ways that training did not have.

    Raises:
        ValueError: If the sign has a list.
    """
    if sign.items:
        raise ValueError("Lists have no other words than those of training.")
    return ways[rng.integers(len(ways))].format(text=sign.text, color=sign.color, background=sign.background)


def transcript(sign: Sign) -> str:
    """What is written on a sign, as one line of text."""
    return f"{sign.text}: {', '.join(sign.items)}" if sign.items else sign.text
