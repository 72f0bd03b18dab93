// What kernels, launchers and tests agree on: the constants of MXFP4 and the tiling.
//
// MXFP4 (OCP Microscaling v1.0): blocks of 32 values share one power of two, the scale 2^(b - 127)
// with b a byte (E8M0, 255 = NaN); a value divided by its scale is one of 0, 0.5, 1, 1.5, 2, 3, 4,
// 6 with a sign (E2M1). Where stacks differ (scale rule, ties, tiny blocks) is a field of
// `Mxfp4Rule`; npu_qat/numerics/profiles.py gives each combination its name.
#pragma once

#include <cstdint>

namespace npu_qat {

constexpr uint32_t kBlock = 32;           // values that share a scale
constexpr uint32_t kBlockBytes = 32;      // the unit of the unified buffer's addresses
constexpr uint32_t kFloatsPerBlock = 8;   // floats in such a unit
constexpr uint32_t kMaxRepeat = 248;      // below the limit of 255, and a multiple of 8
constexpr float kLargest = 6.0f;          // the largest E2M1 magnitude
constexpr float kCarrier = 4194304.0f;    // 2^22, see Mxfp4Block::Round
constexpr uint32_t kNudge = 8;            // 2^-20 in the mantissa of a float between 1 and 2
constexpr int32_t kHalfScale = 0x00400000;  // the float 2^-127: the value of scale byte 0
constexpr int32_t kNan = 0x7FC00000;        // the float NaN

// How a block's scale follows from its largest magnitude, given as the 15 upper bits of that float
// without its sign (exponent and 7 bits of mantissa; all that bf16 has).
struct Mxfp4Rule {
    int32_t bump;       // added to those bits before the exponent is taken: 0 floor, 0x20 even
    int32_t nanAbove;   // larger bits than these make the block NaN: 0x7F7F for Inf and NaN
    int32_t tinyScale;  // the scale of byte 0 as float bits: 0 (all zeros) or kHalfScale (2^-127)
    uint32_t nudge;     // kNudge: ties go away from zero; 0: ties go to even
};

// One launch: `rows` runs of `length` values each, one after another in memory. A run is cut into
// blocks from its start; its last block is filled up with zeros.
struct Mxfp4Tiling {
    uint64_t rows;
    uint64_t length;
    Mxfp4Rule rule;
};

// Values a core takes at a time, by the size of a value in memory: as many as fit the unified
// buffer of 192 KiB (dav-2201; dav-3510 has 248) with two buffers each way.
template <typename T> constexpr uint32_t kTileLength = sizeof(T) == 2 ? 8192 : 4096;

// The part of `total` units that core `index` of `cores` works on: [begin, end).
struct Share {
    uint64_t begin;
    uint64_t end;
};

}  // namespace npu_qat
