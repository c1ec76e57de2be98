"""float4_e2m1fn: all codes, all midpoints and their float32 neighbours, against ml_dtypes and against fractions."""

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import E2M1_MAGNITUDES, midpoints, nearest_code, with_float32_neighbours

from dsv4.quant import e2m1

ALL_CODES = torch.arange(16, dtype=torch.uint8)


def bits(values: torch.Tensor) -> list[int]:
    return values.view(torch.int32).tolist()


def ml_dtypes_codes(values: torch.Tensor) -> list[int]:
    return values.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8).tolist()


def interesting_values() -> torch.Tensor:
    """Every value, every midpoint, the float32 next to each, and the extremes; both signs."""
    positive = with_float32_neighbours([*E2M1_MAGNITUDES[1:], *midpoints(E2M1_MAGNITUDES)])
    positive += [0.0, 2.0**-149, 2.0**-126, 6.5, 7.0, 8.0, 448.0, 3.4028234663852886e38]
    return torch.tensor(positive + [-value for value in positive], dtype=torch.float32)


def test_decode_every_code() -> None:
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert bits(e2m1.decode(ALL_CODES)) == theirs.view(np.int32).tolist()
    assert [float(v) for v in E2M1_MAGNITUDES] == e2m1.decode(ALL_CODES[:8]).tolist() == list(e2m1.MAGNITUDES)


def test_decode_keeps_shape() -> None:
    codes = ALL_CODES.view(2, 2, 4)
    assert torch.equal(e2m1.decode(codes), e2m1.decode(ALL_CODES).view(2, 2, 4))


def test_encode_is_nearest_ties_to_even_saturating() -> None:
    values = interesting_values()
    codes = e2m1.encode(values).tolist()
    assert codes == ml_dtypes_codes(values)
    signs = [8 * bool(np.signbit(v)) for v in values.numpy()]
    assert codes == [nearest_code(abs(v), E2M1_MAGNITUDES) + s for v, s in zip(values.tolist(), signs, strict=True)]


def test_encode_inverts_decode() -> None:
    assert e2m1.encode(e2m1.decode(ALL_CODES)).tolist() == list(range(16))


def test_encode_keeps_the_sign_of_what_rounds_to_zero() -> None:
    assert e2m1.encode(torch.tensor([0.0, -0.0, 0.2, -0.2, -(2.0**-149)])).tolist() == [0, 8, 0, 8, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encode_half_precision(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    values = every[torch.isfinite(every)]
    assert e2m1.encode(values).tolist() == ml_dtypes_codes(values.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_encode_refuses_what_the_format_lacks(bad: float) -> None:
    with pytest.raises(ValueError, match="no NaN and no infinity"):
        e2m1.encode(torch.tensor([1.0, bad]))


def test_pack_and_unpack_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes = e2m1.unpack(packed)
    assert codes.shape == (4, 128)
    byte = 0x3A  # the even element, 0xA, is in the low nibble
    assert codes.flatten()[2 * byte : 2 * byte + 2].tolist() == [0xA, 0x3]
    expected = [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert codes.flatten().tolist() == expected
    assert torch.equal(e2m1.pack(codes), packed)


def test_unpack_int8_as_the_release_stores_it() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(e2m1.unpack(packed.view(torch.int8)), e2m1.unpack(packed))


def test_pack_any_rank_and_strides() -> None:
    codes = torch.randint(0, 16, (3, 5, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(e2m1.unpack(e2m1.pack(codes)), codes)
    swapped = codes.transpose(0, 1)  # not contiguous
    assert torch.equal(e2m1.unpack(e2m1.pack(swapped)), swapped)
    assert e2m1.pack(torch.empty(0, 4, dtype=torch.uint8)).shape == (0, 2)


def test_pack_refuses_an_odd_row() -> None:
    with pytest.raises(ValueError, match="last dimension is 3"):
        e2m1.pack(torch.zeros(2, 3, dtype=torch.uint8))
