"""Engram's parts against Python integers, a sieve and the rules of the release."""

import unicodedata

import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers

from dsv4.errors import InputError
from dsv4.model.kernels.table import REFERENCE, TORCH_DEVICE, KernelTable
from dsv4.model.layers.engram.hashing import (
    RELEASED_CLASSES,
    RELEASED_MULTIPLIERS,
    Engrams,
    NGramHash,
    look_back,
    multipliers,
    primes_of_tables,
)
from dsv4.model.layers.engram.token_classes import class_key, number_classes

RELEASED = Engrams((1, 14), (384006168, 384016682), 4, 8, 256, 16000000, 2, RELEASED_CLASSES)
SMALL = Engrams((1, 4), (1362, 1552), 4, 2, 64, 211, 2, 409)


def test_released_multipliers_are_those_of_the_generator() -> None:
    for layer, frozen in RELEASED_MULTIPLIERS.items():
        drawn = np.random.default_rng(10007 * layer).integers(0, (2**63 - 1) // RELEASED_CLASSES // 2, 4)
        assert frozen == tuple(int(2 * v + 1) for v in drawn)
        assert multipliers(layer, RELEASED_CLASSES, 4).tolist() == list(frozen)
    assert all(m % 2 and m * (RELEASED_CLASSES - 1) < 2**63 for frozen in RELEASED_MULTIPLIERS.values() for m in frozen)


@pytest.mark.parametrize("engrams", [RELEASED, SMALL])
def test_primes(engrams: Engrams) -> None:
    """The first primes from the vocabulary size on, by a sieve; the rows of a table are their sum."""
    end = engrams.vocabulary + 2000
    sieve = np.ones(end, dtype=bool)
    sieve[:2] = False
    for d in range(2, int(end**0.5) + 1):
        if sieve[d]:
            sieve[d * d :: d] = False
    primes = [int(p) for p in engrams.vocabulary + np.flatnonzero(sieve[engrams.vocabulary :])]
    found = primes_of_tables(engrams)
    assert torch.stack(found).flatten().tolist() == primes[: 2 * engrams.columns]
    assert tuple(int(table.sum()) for table in found) == engrams.rows


def test_rows_are_those_of_python_integers() -> None:
    engrams, table = RELEASED, 1
    classes = torch.randint(0, engrams.classes, (50, 4), generator=torch.Generator().manual_seed(3))
    found = NGramHash(engrams, table).rows(classes)
    primes = primes_of_tables(engrams)[table].flatten().tolist()
    for token, row in zip(classes.tolist(), found.tolist(), strict=True):
        expected = []
        for n in (2, 3, 4):
            joined = 0
            for value, multiplier in zip(token[:n], RELEASED_MULTIPLIERS[14], strict=False):
                joined ^= value * multiplier
            for head in range(8):
                column = (n - 2) * 8 + head
                expected.append(joined % primes[column] + sum(primes[:column]))
        assert row == expected
    assert int(found.max()) < engrams.rows[table] and int(found.min()) >= 0


def test_a_table_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"says 1363 rows for layer 1, its primes .* make 1362"):
        NGramHash(Engrams((1, 4), (1363, 1552), 4, 2, 64, 211, 2, 409), 0)


@pytest.mark.parametrize("known", [0, 1, 2, 3, 7])
def test_look_back_does_not_depend_on_the_call(known: int) -> None:
    classes = torch.arange(100, 110)
    whole = [[int(classes[t - i]) if t >= i else 9 for i in range(4)] for t in range(len(classes))]
    # A cache keeps three classes at least.
    kept = classes[max(0, known - 3) : known]
    assert look_back(kept, classes[known:], 4, 9).tolist() == whole[known:]
    assert look_back(classes[:known], classes[known:], 4, 9).tolist() == whole[known:]


# Text of a token, its entry in the vocabulary, and what stands for its class.
KEYS = [
    (" The", "ĠThe", "the"),
    ("the", "the", "the"),
    ("Ｔｈｅ", "x", "the"),  # full width
    ("café", "x", "cafe"),
    ("e\u0301", "x", "e"),
    (" \t ", "x", " "),
    ("\n\n", "ĊĊ", " "),
    ("a \n b", "x", "a b"),
    ("\u3000ab\u00a0", "x", "ab"),
    ("\x1cab\x1f", "x", "\x1cab\x1f"),  # Python would strip these
    ("\u0301", "x", "\u0301"),  # a mark alone: nothing is left, so the text itself
    ("\v", "x", "\v"),  # white space, but no blank
    ("\ufffd", "Ã", "Ã"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "token", "key"), KEYS, ids=[repr(k[0]) for k in KEYS])
def test_class_keys(text: str, token: str, key: str) -> None:
    assert class_key(text, token) == key


def test_class_keys_are_those_of_the_tokenizers_library() -> None:
    """The same rule from the normalizers of the library, for every character of Unicode 3.2, alone and within a word.

    Later versions gave some newer characters other decompositions; the library's tables are not of Python's version.
    """
    blank = "\ue000"
    steps = [normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    steps += [normalizers.Replace(Regex(r"[ \t\r\n]+"), " "), normalizers.Replace(Regex("^ $"), blank)]
    library = normalizers.Sequence([*steps, normalizers.Strip(), normalizers.Replace(blank, " ")])
    known = [chr(i) for i in range(0x10000) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]
    texts = [text for c in known if c != "\ufffd" for text in (c, f" É{c}\t")]
    assert len(texts) > 100_000
    assert [text for text in texts if class_key(text, "") != (library.normalize_str(text) or text)] == []


def test_classes_are_numbered_by_first_appearance() -> None:
    assert number_classes(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("kernels", [REFERENCE, TORCH_DEVICE], ids=["reference", "torch"])
def test_gate(kernels: KernelTable) -> None:
    """The formula in float64; float32 sums of 160 products are off by some 1e-6 of their terms."""
    generator = torch.Generator().manual_seed(4)
    h, keys = (torch.randn(20, 4, 160, generator=generator) for _ in range(2))
    h[0], keys[1], keys[2] = 0, 0, h[2] * 30
    weight = torch.randn(4, 160, generator=generator)
    wide, wide_keys = h.double(), keys.double()

    def inverse_rms(x: torch.Tensor) -> torch.Tensor:
        return (x.square().mean(-1) + 1e-20).rsqrt()

    dot = (wide * weight * wide_keys).sum(-1) * inverse_rms(wide) * inverse_rms(wide_keys) / 160**0.5
    expected = torch.sigmoid(dot.sign() * dot.abs().clamp(min=1e-6).sqrt())
    assert expected[0].tolist() == [0.5] * 4, "no similarity, no sign: half"
    assert (kernels.engram_gate(h, keys, weight, 1e-20).double() - expected).abs().max() < 1e-5
