"""Pictures of dots with words, for tests of training."""

import numpy as np

SQUARE = ((1, 1), (2, 2), (3, 3), (4, 4))


class Dots:
    """Eight pictures of one bright spot, with words."""

    def __init__(self, size=32, pictures=8):
        self.size, self.pictures = size, pictures

    def __len__(self):
        return self.pictures

    def image(self, index):
        picture = np.zeros((self.size, self.size, 3), np.uint8)
        picture[4 * (index % 8) : 4 * (index % 8) + 4, 4:12] = 255
        return picture

    def prompt(self, index, rng):
        return f"dot {index}" if rng.random() < 0.5 else f"draw dot {index}"

    def question(self, index, rng):
        return "which", f"dot {index}"


def codes_of(n=30):
    return list(range(n))


class DotRecords(Dots):
    """The same as records of a dataset."""

    def __getitem__(self, index):
        return {"id": index, "image": self.image(index), "words": [f"dot {index}", f"draw dot {index}"]}
