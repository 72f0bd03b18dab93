"""The arithmetic of ``numerics/`` as machine code for the CPU, compiled here by Numba (LLVM).

A 4-bit fake-quantiser in plain PyTorch makes a dozen passes over memory. These kernels make one:
they take a tile that fits into the first-level cache through three short loops,

    load     bf16, fp16 or fp32, or 4-bit codes  ->  fp32 patterns in the tile
    grid     per block: the largest magnitude, its scale, every element onto the E2M1 grid
    store    the tile  ->  bf16, fp16 or fp32, or 4-bit codes and scale bytes

so each loop is written once for all dtypes and formats, and LLVM turns it into vector code for the
machine that it runs on (AVX2, AVX-512, NEON). What a profile decides arrives at run time: a
rounding code, a scale rule, and for E8M0 formats the very tables that ``scales`` computes with.
Roundings use the reference's own fp32 operations in the reference's order (see ``e2m1`` and
``scales`` for why they are right); nothing is reassociated, contracted or approximated, so results
are equal bit for bit, which the tests check over every 16-bit pattern.

**Threads.** Numba could bring a pool of its own, and two pools on the same cores wait for each
other. Instead the kernels run on the OpenMP pool that PyTorch itself uses (``GOMP_parallel`` of the
library that torch has loaded), in as many threads as ``torch.get_num_threads()`` says.

**One file.** Numba keeps the machine code of ``quantize`` and ``dequantize`` on disk, and makes it
anew when the file in which they are defined has changed. A change in another file, from which they
take a function, it does not notice, so that everything they are made of is defined here.

**Calls.** Tensors come as addresses, so that a call costs about a microsecond. The caller
(``cpu.py``) answers for shapes, contiguity and lifetimes.

Notation: a tensor is R rows of n elements along the blocked axis; a row is cut into tiles, a tile
into blocks, the last one padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npu_qat.numerics import dual_level, scales

TILE = 2048  # elements; fp32 patterns of it take 8 KiB. A multiple of every block and of 512.
MOST_BLOCKS = TILE // 16

# dtypes of inputs and outputs
BF16, FP16, FP32 = 0, 1, 2
# modes: numbers, or codes with scale bytes
NUMBERS, CODES = 0, 1
# scale rules
BINADE, QUANT_COMPUTE, GIVEN, MSE, E4M3, CLAMPED_CARRY = 0, 1, 2, 3, 4, 5
# roundings of elements; NEAREST is half_even, and half_away where tables hold nudged factors
NEAREST, HALF_AWAY, HALF_DOWN, TOWARD_ZERO, TOWARD_MINUS_INF = 0, 1, 2, 3, 4

# Fields of the profile record, an int64 array (`cpu.py` fills it).
(
    P_BLOCK,
    P_RULE,
    P_BUMP,
    P_INF_SATURATES,
    P_ROUNDING,
    P_CUT,
    P_DIVIDES,
    P_LEVEL0,
    P_FACTORS,
    P_VALUES,
    P_BYTES,
    P_FIELDS,
) = range(12)

_I32 = np.int32
_MAGNITUDE = _I32(0x7FFFFFFF)
_SHORT_MAGNITUDE = _I32(0x7FFF0000)
_SIGN = _I32(-0x80000000)
_INF_BITS = _I32(scales.INF_BITS)
_NAN_BITS = _I32(0x7FC00000)
_ONE_BITS = _I32(0x3F800000)
_MIN_NORMAL_E4M3_BITS = _I32(0x3C800000)
_MIN_NORMAL_FP16_BITS = _I32(0x38800000)

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_MAX = np.float32(6.0)
_E2M1_CARRIER = np.float32(2.0**22)
_E4M3_CARRIER = np.float32(2.0**20)
_E4M3_MAX = np.float32(scales.E4M3_MAX)
_FP32_MAX = np.float32(scales.FP32_MAX)
_FP32_TINY = np.float32(scales.FP32_TINY)
_RESCUE = np.float32(scales.RESCUE)
_TINY_TENSOR_SCALE = np.float32(scales.TINY_TENSOR_SCALE)
_EPSILON = np.float32(scales.EPSILON)
_SIXTH = np.float32(dual_level.SIXTH)
_INFINITY = np.float32(np.inf)


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, error_model="numpy")(function)


# --- memory and bit patterns ----------------------------------------------------------------------


def _accessors(number: Any, llvm: ir.Type) -> tuple[Any, Any]:
    """Read and write element ``i`` at an address; no bounds, no negative indices."""

    @intrinsic
    def get(context: Any, address: Any, i: Any) -> Any:
        def code(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], llvm.as_pointer())
            return builder.load(builder.gep(pointer, [args[1]]))

        return number(types.int64, types.int64), code

    @intrinsic
    def put(context: Any, address: Any, i: Any, value: Any) -> Any:
        def code(c: Any, builder: Any, _s: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], llvm.as_pointer())
            builder.store(args[2], builder.gep(pointer, [args[1]]))
            return c.get_dummy_value()

        return types.void(types.int64, types.int64, number), code

    return get, put


_get_u8, _put_u8 = _accessors(types.uint8, ir.IntType(8))
_get_i16, _put_i16 = _accessors(types.int16, ir.IntType(16))
_get_i32, _put_i32 = _accessors(types.int32, ir.IntType(32))
_get_i64, _put_i64 = _accessors(types.int64, ir.IntType(64))
_get_f32, _put_f32 = _accessors(types.float32, ir.FloatType())


def _bitcast(source: Any, result: Any, llvm: ir.Type) -> Any:
    @intrinsic
    def cast(context: Any, x: Any) -> Any:
        def code(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            return builder.bitcast(args[0], llvm)

        return result(source), code

    return cast


_as_float = _bitcast(types.int32, types.float32, ir.FloatType())
_as_int = _bitcast(types.float32, types.int32, ir.IntType(32))


def _block_maximum(width: int) -> Any:
    """The largest magnitude pattern of ``width`` fp32 patterns, as one vector reduction.

    Written as a loop, LLVM unrolls it into scalar compares before it looks for vectors.
    """
    vector = ir.VectorType(ir.IntType(32), width)
    reduction = ir.FunctionType(ir.IntType(32), [vector])

    @intrinsic
    def maximum(context: Any, address: Any, i: Any) -> Any:
        def code(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
            pointer = builder.bitcast(builder.gep(pointer, [args[1]]), vector.as_pointer())
            bits = builder.load(pointer, align=4)
            bits = builder.and_(bits, ir.Constant(vector, [0x7FFFFFFF] * width))
            name = f"llvm.vector.reduce.smax.v{width}i32"
            return builder.call(
                cgutils.get_or_insert_function(builder.module, reduction, name), [bits]
            )

        return types.int32(types.int64, types.int64), code

    return maximum


_maximum_of_16, _maximum_of_32 = _block_maximum(16), _block_maximum(32)


# --- load and store -------------------------------------------------------------------------------


@_compiled
def _fp32_of_fp16(half: np.int16) -> np.int32:
    """The fp32 pattern of an fp16 pattern (exact): shift, then multiply the exponents right."""
    magnitude = _I32(_I32(half & _I32(0x7FFF)) << 13)
    number = _as_int(_as_float(magnitude) * np.float32(2.0**112))
    special = _I32(magnitude | _INF_BITS)
    magnitude = special if magnitude >= _I32(0x7C00 << 13) else number
    return _I32(magnitude | _I32(_I32(half) & _SIGN))


@_compiled
def _bf16_of_fp32(bits: np.int32) -> np.int16:
    """To nearest even; NaN stays NaN."""
    odd = _I32((bits >> 16) & 1)
    rounded = _I32(_I32(bits + _I32(0x7FFF)) + odd)
    nan = _I32(bits & _MAGNITUDE) > _INF_BITS
    return np.int16((_I32(_I32(bits & _SIGN) | _NAN_BITS) if nan else rounded) >> 16)


@_compiled
def _fp16_of_fp32(bits: np.int32) -> np.int16:
    """To nearest even, with subnormal numbers; NaN stays NaN."""
    magnitude = _I32(bits & _MAGNITUDE)
    # Below 2^-14 the spacing is 2^-24, that of fp32 just above 0.5: the addition rounds.
    small = _I32(_as_int(_as_float(magnitude) + _HALF) - _I32(0x3F000000))
    odd = _I32((magnitude >> 13) & 1)
    normal = _I32(_I32(magnitude - _I32(0x38000000 - 0xFFF)) + odd) >> 13
    half = small if magnitude < _MIN_NORMAL_FP16_BITS else _I32(normal)
    half = _I32(0x7C00) if magnitude >= _I32(0x47800000) else half  # from 2^16 on
    half = _I32(0x7E00) if magnitude > _INF_BITS else half
    return np.int16(half | _I32((bits >> 16) & _I32(0x8000)))


@_compiled
def _load(source: int, dtype: int, start: int, count: int, tile: int) -> None:
    """Fill the tile with ``count`` elements, then with zeros up to whole blocks."""
    if dtype == BF16:
        for i in range(count):
            _put_i32(tile, i, _I32(_I32(_get_i16(source, start + i)) << 16))
    elif dtype == FP16:
        for i in range(count):
            _put_i32(tile, i, _fp32_of_fp16(_get_i16(source, start + i)))
    else:
        for i in range(count):
            _put_i32(tile, i, _get_i32(source, start + i))
    for i in range(count, min(TILE, count + 31)):
        _put_i32(tile, i, _I32(0))


@_compiled
def _store(tile: int, dtype: int, target: int, start: int, count: int) -> None:
    if dtype == BF16:
        for i in range(count):
            _put_i16(target, start + i, _bf16_of_fp32(_get_i32(tile, i)))
    elif dtype == FP16:
        for i in range(count):
            _put_i16(target, start + i, _fp16_of_fp32(_get_i32(tile, i)))
    else:
        for i in range(count):
            _put_i32(target, start + i, _get_i32(tile, i))


@_compiled
def _store_codes(tile: int, target: int, start: int, count: int) -> None:
    """E2M1 codes of the signed grid values in the tile; 0 for NaN."""
    for i in range(count):
        bits = _get_i32(tile, i)
        magnitude = _I32(bits & _MAGNITUDE)
        # From 1 on the code is the exponent's low end and one mantissa bit; 0.5 has code 1.
        code = _I32(_I32(magnitude >> 22) - _I32(252))
        code = _I32(magnitude != _I32(0)) if magnitude < _ONE_BITS else code
        code = _I32(code | _I32(_I32(bits >> 28) & _I32(8)))
        code = _I32(0) if magnitude > _INF_BITS else code
        _put_u8(target, start + i, np.uint8(code))


# --- block scales ---------------------------------------------------------------------------------


@_compiled
def _round_to_e4m3(s: np.float32) -> np.float32:
    s = _E4M3_MAX if s > _E4M3_MAX else s
    exponent = _I32(_as_int(s) & _INF_BITS)
    exponent = _MIN_NORMAL_E4M3_BITS if exponent < _MIN_NORMAL_E4M3_BITS else exponent
    carrier = _as_float(exponent) * _E4M3_CARRIER
    return (s + carrier) - carrier


@_compiled
def _e4m3_byte(s: np.float32) -> np.int32:
    """The byte of a scale that lies on the E4M3 grid."""
    # A subnormal one is k/512; adding 2^14 (1/512 is its last bit) leaves k in the low bits.
    small = _I32(_as_int(s + np.float32(2.0**14)) & _I32(7))
    normal = _I32(_I32(_as_int(s) >> 20) - _I32(120 << 3))
    byte = small if s < np.float32(2.0**-6) else normal
    return _I32(0x7F) if s != s else byte


@_compiled
def _clamped_carry_scale(amax: np.float32) -> np.float32:
    floor = np.float32(1e-10)
    raw = (floor if amax < floor else amax) / _MAX
    exponent = _I32((_as_int(raw) >> 23) - 127)
    exponent = min(max(exponent, _I32(-6)), _I32(8))
    binade = _as_float(_I32(_I32(exponent + _I32(127)) << 23))
    mantissa = np.rint(raw / binade * np.float32(8.0)) / np.float32(8.0)
    mantissa = _ONE if mantissa < _ONE else mantissa
    mantissa = np.float32(1.875) if mantissa > np.float32(1.875) else mantissa
    return mantissa * binade


@_compiled
def _mse_byte(tile: int, offset: int, block: int, amax_bits: np.int32) -> np.int32:
    """Of the floor exponent and its neighbours the one with the least squared error (float64)."""
    floor_byte = _I32((amax_bits >> 23) - 2)
    best, least = _I32(0), np.inf
    if floor_byte <= 0:
        return best
    for candidate in range(-1, 2):
        byte = _I32(floor_byte + candidate)
        if byte < 1 or byte > 254:
            continue
        scale = _as_float(_I32(byte << 23))
        inverse = _as_float(_I32(_I32(254 - byte) << 23))
        if byte == 254:
            inverse = np.float32(2.0**-127)
        total = 0.0
        for i in range(block):
            a = _as_float(_I32(_get_i32(tile, offset + i) & _MAGNITUDE))
            element = _to_grid(a * inverse, False, HALF_AWAY)
            error = np.float64(a) - np.float64(element) * np.float64(scale)
            total += error * error
        if total < least:
            best, least = byte, total
    return best


@_compiled
def _binade_index(amax_bits: np.int32, bump: int, inf_saturates: int) -> np.int32:
    if amax_bits >= _INF_BITS:
        return _I32(257) if inf_saturates and amax_bits == _INF_BITS else _I32(256)
    return _I32(_I32(amax_bits + bump) >> 23)


@_compiled
def _quant_compute_byte(amax_bits: np.int32) -> np.int32:
    if amax_bits > _INF_BITS:
        return _I32(255)
    shifted = _as_int(_as_float(amax_bits) + _EPSILON)
    return min(_I32((shifted >> 23) - 2), _I32(252))


# --- elements -------------------------------------------------------------------------------------


@_compiled
def _nearest(v: np.float32) -> np.float32:
    """To the E2M1 grid, ties to even, saturating (``e2m1.round_to_nearest_``)."""
    v = _MAX if v > _MAX else v
    exponent = _I32(_as_int(v) & _INF_BITS)
    exponent = _ONE_BITS if exponent < _ONE_BITS else exponent
    carrier = _as_float(exponent) * _E2M1_CARRIER
    return (v + carrier) - carrier


@_compiled
def _to_grid(v: np.float32, negative: bool, rounding: int) -> np.float32:
    """To the E2M1 grid by any rounding (``e2m1.round_``)."""
    if rounding == HALF_AWAY:
        return _nearest(_as_float(_I32(_I32(_as_int(v) & _I32(-65536)) | _I32(1))))
    if rounding == NEAREST:
        return _nearest(v)
    v = _MAX if v > _MAX else v
    exponent = _I32(_as_int(v) & _INF_BITS)
    exponent = _ONE_BITS if exponent < _ONE_BITS else exponent
    step = _as_float(exponent) * _HALF
    r = v / step
    if rounding == HALF_DOWN:
        r = np.abs(np.ceil(r - _HALF))
    elif rounding == TOWARD_MINUS_INF and negative:
        r = np.ceil(r)
    else:
        r = np.floor(r)
    return r * step


@_compiled
def _nearest_block(
    tile: int, offset: int, mask: np.int32, factor: np.float32, value: np.float32
) -> None:
    """A block of 32 with the roundings that nearly everything uses."""
    for i in range(32):
        bits = _get_i32(tile, offset + i)
        v = _nearest(_as_float(_I32(bits & mask)) * factor) * value
        _put_i32(tile, offset + i, _I32(_as_int(v) | _I32(bits & _SIGN)))


@_compiled
def _nearest_pair(tile: int, offset: int, mask: np.int32, factor: int, value: int) -> None:
    """The same for two blocks of 16, whose scales are the first two at ``factor`` and ``value``.

    A loop of 16 alone LLVM unrolls into scalar code.
    """
    f0, f1 = _get_f32(factor, 0), _get_f32(factor, 1)
    v0, v1 = _get_f32(value, 0), _get_f32(value, 1)
    for i in range(32):
        bits = _get_i32(tile, offset + i)
        f, s = (f0, v0) if i < 16 else (f1, v1)
        v = _nearest(_as_float(_I32(bits & mask)) * f) * s
        _put_i32(tile, offset + i, _I32(_as_int(v) | _I32(bits & _SIGN)))


@_compiled
def _any_block(
    tile: int,
    offset: int,
    width: int,
    lift: np.float32,
    factor: np.float32,
    divides: int,
    value: np.float32,
    rounding: int,
    dtype: int,
) -> None:
    """A block with any rounding, a divisor, or a tensor that has to be lifted."""
    for i in range(width):
        bits = _get_i32(tile, offset + i)
        a = _as_float(_I32(bits & _MAGNITUDE))
        if lift != _ONE:
            a = a * lift
            a = _FP32_MAX if a > _FP32_MAX else a
        v = a / factor if divides else a * factor
        if rounding == TOWARD_MINUS_INF:
            # Downwards even the tiniest negative number counts; bf16 has a bf16 quotient.
            if dtype == BF16:
                v = _as_float(_I32(_I32(_bf16_of_fp32(_as_int(v))) << 16))
            elif v == _ZERO and a != _ZERO and factor != _ZERO:
                v = _FP32_TINY
        v = _to_grid(v, bits < _I32(0), rounding) * value
        _put_i32(tile, offset + i, _I32(_as_int(v) | _I32(bits & _SIGN)))


@_compiled
def _e8m0_scales(
    tile: int,
    blocks: int,
    first_block: int,
    profile: int,
    amax: int,
    factor: int,
    value: int,
    byte: int,
    given: int,
) -> None:
    """Factors, values and bytes of power-of-two scales, from the profile's tables."""
    block, rule = _get_i64(profile, P_BLOCK), _get_i64(profile, P_RULE)
    bump, inf_saturates = _get_i64(profile, P_BUMP), _get_i64(profile, P_INF_SATURATES)
    factors, values = _get_i64(profile, P_FACTORS), _get_i64(profile, P_VALUES)
    bytes_of = _get_i64(profile, P_BYTES)
    for b in range(blocks):
        amax_bits = _get_i32(amax, b)
        if rule == BINADE:
            index = _binade_index(amax_bits, bump, inf_saturates)
        elif rule == QUANT_COMPUTE:
            index = _quant_compute_byte(amax_bits)
        elif rule == GIVEN:
            index = _I32(_get_u8(given, first_block + b))
        else:
            index = _mse_byte(tile, b * block, block, amax_bits)
        _put_f32(factor, b, _get_f32(factors, index))
        _put_f32(value, b, _get_f32(values, index))
        _put_i32(byte, b, _I32(_get_u8(bytes_of, index)))


@_compiled
def _e4m3_scales(
    blocks: int,
    profile: int,
    amax: int,
    factor: int,
    value: int,
    byte: int,
    tensor_scale: np.float32,
    applied_scale: np.float32,
    lift: np.float32,
) -> None:
    """The same for E4M3 scales (``scales._e4m3_scales``); no branch, so that it is vector code."""
    inf_saturates = _get_i64(profile, P_INF_SATURATES) != 0
    divides = _get_i64(profile, P_DIVIDES) != 0
    scaled = tensor_scale >= _ZERO
    g = tensor_scale * lift if scaled else _ONE
    unit = g * _MAX
    unit = _FP32_TINY if unit < _FP32_TINY else unit
    encoded = _ONE / (_ONE / g) if scaled else _ONE
    applied = applied_scale if scaled else _ONE
    for b in range(blocks):
        largest = _as_float(_get_i32(amax, b))
        top = largest * lift
        top = _FP32_MAX if lift != _ONE and top > _FP32_MAX else top
        s = _round_to_e4m3(top / unit)
        s = s if inf_saturates else s + largest * _ZERO
        divisor = s * encoded
        if divides:
            f = _INFINITY if divisor == _ZERO else divisor
        else:
            f = _ONE / divisor
            f = _ZERO if f == _INFINITY else f
        _put_f32(factor, b, f)
        _put_f32(value, b, s * applied)
        _put_i32(byte, b, _e4m3_byte(s))


@_compiled
def _clamped_carry_scales(blocks: int, amax: int, factor: int, value: int, byte: int) -> None:
    for b in range(blocks):
        s = _clamped_carry_scale(_as_float(_get_i32(amax, b)))
        code = _I32(_I32(_as_int(s) >> 20) - _I32(120 << 3))
        _put_f32(factor, b, s)
        _put_f32(value, b, s)
        _put_i32(byte, b, _I32(0xFF) if s != s else code)


@_compiled
def _grid(
    tile: int,
    blocks: int,
    first_block: int,
    profile: int,
    dtype: int,
    mode: int,
    tensor_scale: np.float32,
    applied_scale: np.float32,
    scale_bytes: int,
    room: int,
) -> None:
    """Bring ``blocks`` blocks of the tile onto the grid: times their scales, or as grid values.

    ``scale_bytes``: where scale bytes go (``CODES``), or come from (rule ``GIVEN``). A
    ``tensor_scale`` below 0 means that there is none; ``applied_scale`` multiplies the result.
    ``room``: for four numbers a block.
    """
    block, rule = _get_i64(profile, P_BLOCK), _get_i64(profile, P_RULE)
    rounding, divides = _get_i64(profile, P_ROUNDING), _get_i64(profile, P_DIVIDES)
    amax, factor = room, room + 4 * MOST_BLOCKS
    value, byte = room + 8 * MOST_BLOCKS, room + 12 * MOST_BLOCKS
    lifted = tensor_scale >= _ZERO and tensor_scale < _TINY_TENSOR_SCALE
    lift = _RESCUE if lifted else _ONE
    if block == 32:
        for b in range(blocks):
            _put_i32(amax, b, _maximum_of_32(tile, 32 * b))
    else:
        for b in range(blocks):
            _put_i32(amax, b, _maximum_of_16(tile, 16 * b))
    if rule == E4M3:
        _e4m3_scales(blocks, profile, amax, factor, value, byte, tensor_scale, applied_scale, lift)
    elif rule == CLAMPED_CARRY:
        _clamped_carry_scales(blocks, amax, factor, value, byte)
    else:
        _e8m0_scales(tile, blocks, first_block, profile, amax, factor, value, byte, scale_bytes)
    if mode == CODES:
        for b in range(blocks):
            _put_f32(value, b, _ONE)
            if rule != GIVEN:
                _put_u8(scale_bytes, first_block + b, np.uint8(_get_i32(byte, b)))
    cut = _get_i64(profile, P_CUT) != 0 and dtype == FP32
    mask = _SHORT_MAGNITUDE if cut else _MAGNITUDE
    if rounding != NEAREST or divides or lifted:
        for b in range(blocks):
            f, v = _get_f32(factor, b), _get_f32(value, b)
            _any_block(tile, block * b, block, lift, f, divides, v, rounding, dtype)
    elif block == 32:
        for b in range(blocks):
            _nearest_block(tile, 32 * b, mask, _get_f32(factor, b), _get_f32(value, b))
    else:
        for b in range(0, blocks, 2):
            _nearest_pair(tile, 16 * b, mask, factor + 4 * b, value + 4 * b)


# --- dual level -----------------------------------------------------------------------------------


@_compiled
def _divide_by_level0(
    tile: int, count: int, group: int, dtype: int, scales0: int, first_group: int
) -> None:
    """Divide groups by their level-0 scale, in 16 bits (``numerics.dual_level``)."""
    for k in range((count + group - 1) // group):
        start, end = k * group, min(count, (k + 1) * group)
        amax = _I32(0)
        for i in range(start, end):
            bits = _I32(_get_i32(tile, i) & _MAGNITUDE)
            bits = _I32(0) if bits >= _INF_BITS else bits
            amax = bits if bits > amax else amax
        s0 = _as_float(amax) * _SIXTH
        s0 = _ZERO if s0 < _FP32_TINY else s0
        _put_f32(scales0, first_group + k, s0)
        for i in range(start, end):
            bits = _get_i32(tile, i)
            quotient = _as_int(_as_float(bits) / s0)
            if dtype == FP16:
                short = _fp32_of_fp16(_fp16_of_fp32(quotient))
            else:
                short = _I32(_I32(_bf16_of_fp32(quotient)) << 16)
            _put_i32(tile, i, bits if _I32(bits & _MAGNITUDE) == _I32(0) else short)


@_compiled
def _multiply(tile: int, start: int, end: int, factor: np.float32) -> None:
    for i in range(start, end):
        _put_f32(tile, i, _get_f32(tile, i) * factor)


# --- whole tensors --------------------------------------------------------------------------------


@_compiled
def _share(units: int, part: int, parts: int) -> tuple[int, int]:
    """The units [start, end) of one of ``parts`` equal shares."""
    return units * part // parts, units * (part + 1) // parts


@_compiled
def _quantize_part(job: int, part: int, parts: int) -> None:
    """One thread's share of ``quantize`` or ``fake_quant``; ``job``: the arguments of ``quantize``.

    Level-0 scales go to an array in both modes: a thread writes a group's and reads it again.
    """
    source, dtype = _get_i64(job, 0), _get_i64(job, 1)
    target, mode = _get_i64(job, 2), _get_i64(job, 3)
    rows, n = _get_i64(job, 4), _get_i64(job, 5)
    profile, scale_bytes = _get_i64(job, 6), _get_i64(job, 7)
    scales0 = _get_i64(job, 8)
    tensor_scale, applied_scale = _get_f32(job, 18), _get_f32(job, 19)
    block, level0 = _get_i64(profile, P_BLOCK), _get_i64(profile, P_LEVEL0)
    row_tiles = (n + TILE - 1) // TILE
    row_blocks = (n + block - 1) // block
    group = max(1, min(level0, n))
    row_groups = (n + group - 1) // group
    # The level-0 quotient of 16 bits: fp32 input uses bf16, whose quotients need no cut.
    inner_dtype = BF16 if level0 > 0 and dtype == FP32 else dtype
    memory = np.empty(TILE + 4 * MOST_BLOCKS, np.int32)
    tile = memory.ctypes.data
    first, last = _share(rows * row_tiles, part, parts)
    for unit in range(first, last):
        row, start = unit // row_tiles, (unit % row_tiles) * TILE
        count = min(TILE, n - start)
        _load(source, dtype, row * n + start, count, tile)
        first_group = row * row_groups + start // group
        if level0 > 0:
            _divide_by_level0(tile, count, group, dtype, scales0, first_group)
        _grid(
            tile,
            (count + block - 1) // block,
            row * row_blocks + start // block,
            profile,
            inner_dtype,
            mode,
            tensor_scale,
            applied_scale,
            scale_bytes,
            tile + 4 * TILE,
        )
        if mode == CODES:
            _store_codes(tile, target, row * n + start, count)
            continue
        if level0 > 0:
            for k in range((count + group - 1) // group):
                s0 = _get_f32(scales0, first_group + k)
                _multiply(tile, k * group, min(count, (k + 1) * group), s0)
        _store(tile, dtype, target, row * n + start, count)
    memory[0] = 0  # keeps the tile alive until here


@_compiled
def _value_of_code(code: np.int32) -> np.float32:
    """The E2M1 number of a code 0..15."""
    magnitude = _I32(code & _I32(7))
    exponent = _I32(_I32(magnitude >> 1) + _I32(126))
    bits = _I32(_I32(exponent << 23) | _I32(_I32(magnitude & _I32(1)) << 22))
    bits = _I32(magnitude * _I32(0x3F000000)) if magnitude < _I32(2) else bits
    return _as_float(_I32(bits | _I32(_I32(code & _I32(8)) << 28)))


@_compiled
def _dequantize_part(job: int, part: int, parts: int) -> None:
    """One thread's share of ``dequantize``; ``job``: its arguments."""
    source, packed = _get_i64(job, 0), _get_i64(job, 1)
    target, dtype = _get_i64(job, 2), _get_i64(job, 3)
    rows, n, block = _get_i64(job, 4), _get_i64(job, 5), _get_i64(job, 6)
    scale_bytes, values = _get_i64(job, 7), _get_i64(job, 8)
    scales0, level0 = _get_i64(job, 9), _get_i64(job, 10)
    row_tiles = (n + TILE - 1) // TILE
    row_blocks = (n + block - 1) // block
    row_bytes = (n + 1) // 2 if packed else n
    row_groups = (n + level0 - 1) // level0 if level0 > 0 else 0
    memory = np.empty(TILE + 1, np.int32)
    tile = memory.ctypes.data
    first, last = _share(rows * row_tiles, part, parts)
    for unit in range(first, last):
        row, start = unit // row_tiles, (unit % row_tiles) * TILE
        count = min(TILE, n - start)
        if packed:
            base = row * row_bytes + start // 2
            for i in range((count + 1) // 2):
                pair = _I32(_get_u8(source, base + i))
                _put_f32(tile, 2 * i, _value_of_code(pair))
                _put_f32(tile, 2 * i + 1, _value_of_code(_I32(pair >> 4)))
        else:
            base = row * row_bytes + start
            for i in range(count):
                _put_f32(tile, i, _value_of_code(_I32(_get_u8(source, base + i))))
        first_block = row * row_blocks + start // block
        for b in range((count + block - 1) // block):
            value = _get_f32(values, _I32(_get_u8(scale_bytes, first_block + b)))
            _multiply(tile, b * block, min(count, (b + 1) * block), value)
        if level0 > 0:
            for k in range((count + level0 - 1) // level0):
                s0 = _get_f32(scales0, row * row_groups + start // level0 + k)
                _multiply(tile, k * level0, min(count, (k + 1) * level0), s0)
        _store(tile, dtype, target, row * n + start, count)
    memory[0] = 0


# --- entry points ---------------------------------------------------------------------------------

# Functions of PyTorch's own OpenMP library; `cpu.py` tells LLVM where they are.
_gomp_parallel = types.ExternalFunction(
    "npu_qat_gomp_parallel",
    types.void(types.int64, types.int64, types.uint32, types.uint32),
)
_thread_number = types.ExternalFunction("npu_qat_omp_get_thread_num", types.int32())
_thread_count = types.ExternalFunction("npu_qat_omp_get_num_threads", types.int32())


def _cached(decorator: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """``decorator`` with compiled code kept on disk, where there is a folder for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return decorator(*args, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return decorator(*args, **options)(function)

    return decorate


def _quantize_on_one_thread(job: int) -> None:
    _quantize_part(job, int(_thread_number()), int(_thread_count()))


def _dequantize_on_one_thread(job: int) -> None:
    _dequantize_part(job, int(_thread_number()), int(_thread_count()))


@lru_cache(maxsize=2)
def worker(which: str) -> int:
    """Address of what each thread of ``quantize`` or ``dequantize`` runs; compiled when needed."""
    on_one_thread = {"quantize": _quantize_on_one_thread, "dequantize": _dequantize_on_one_thread}
    compiled = _cached(numba.cfunc, "void(int64)", nopython=True)(on_one_thread[which])
    address: int = compiled.address
    return address


@_cached(numba.njit, nogil=True)
def quantize(
    source: int,
    dtype: int,
    target: int,
    mode: int,
    rows: int,
    n: int,
    profile: int,
    scale_bytes: int,
    scales0: int,
    tensor_scale: float,
    applied_scale: float,
    worker: int,
    threads: int,
) -> None:
    """Fake-quantise or quantise a contiguous [rows, n] tensor along its rows.

    Args:
        source, dtype: where the tensor is; ``BF16``, ``FP16`` or ``FP32``.
        target, mode: where ``NUMBERS`` in the same dtype, or ``CODES`` (uint8), go.
        rows, n: its shape.
        profile: the profile record.
        scale_bytes: of ``CODES``, and those given for rule ``GIVEN``; else 0.
        scales0: room for the level-0 scales (fp32) of dual-level profiles; else 0.
        tensor_scale: fp32 number, or -1 for none.
        applied_scale: multiplies block scales in ``NUMBERS``: the tensor scale, or 1.
        worker, threads: ``worker("quantize")`` and how many threads run it; 0, 1 for this thread.
    """
    memory = np.empty(10, np.int64)
    job = memory.ctypes.data
    for i, value in enumerate((source, dtype, target, mode, rows, n, profile, scale_bytes)):
        _put_i64(job, i, value)
    _put_i64(job, 8, scales0)
    _put_f32(job, 18, np.float32(tensor_scale))
    _put_f32(job, 19, np.float32(applied_scale))
    if threads > 1:
        _gomp_parallel(worker, job, threads, 0)
    else:
        _quantize_part(job, 0, 1)
    memory[0] = 0


@_cached(numba.njit, nogil=True)
def dequantize(
    source: int,
    packed: int,
    target: int,
    dtype: int,
    rows: int,
    n: int,
    block: int,
    scale_bytes: int,
    values: int,
    scales0: int,
    level0: int,
    worker: int,
    threads: int,
) -> None:
    """Numbers of the codes of a [rows, n] tensor blocked along its rows.

    Args:
        source, packed: codes, one a byte (0) or two (1).
        target, dtype: where the numbers go, and as what.
        rows, n, block: shape and block size.
        scale_bytes, values: a byte a block, and the 256 fp32 numbers that bytes stand for.
        scales0, level0: fp32 level-0 scales and the size of their groups, or 0, 0.
        worker, threads: as for ``quantize``.
    """
    memory = np.empty(11, np.int64)
    job = memory.ctypes.data
    for i, value in enumerate(
        (source, packed, target, dtype, rows, n, block, scale_bytes, values, scales0, level0)
    ):
        _put_i64(job, i, value)
    if threads > 1:
        _gomp_parallel(worker, job, threads, 0)
    else:
        _dequantize_part(job, 0, 1)
    memory[0] = 0


@_cached(numba.njit, nogil=True)
def block_maxima(source: int, dtype: int, target: int, rows: int, n: int, block: int) -> None:
    """The largest magnitude of each block as an fp32 pattern (int32)."""
    row_tiles = (n + TILE - 1) // TILE
    row_blocks = (n + block - 1) // block
    memory = np.empty(TILE, np.int32)
    tile = memory.ctypes.data
    for unit in range(rows * row_tiles):
        row, start = unit // row_tiles, (unit % row_tiles) * TILE
        count = min(TILE, n - start)
        _load(source, dtype, row * n + start, count, tile)
        for b in range((count + block - 1) // block):
            offset = b * block
            amax = _maximum_of_32(tile, offset) if block == 32 else _maximum_of_16(tile, offset)
            _put_i32(target, row * row_blocks + start // block + b, amax)
    memory[0] = 0
