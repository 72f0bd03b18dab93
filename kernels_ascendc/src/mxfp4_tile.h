// MXFP4 on one tile of values in the unified buffer: the arithmetic that all kernels here share.
//
// A2 and A3 have no 4-bit type and no bf16 arithmetic: everything is done in float, and exactly.
// With |x| the magnitudes of a block of 32 values:
//
//   1. largest   The 16 upper bits of the float |x|, as an integer, order like |x| itself. They are
//                turned into floats (whole numbers, so that no NaN can get lost in a comparison)
//                and the largest one of each block is taken.
//   2. scale     largest >> 7 is the biased exponent e of the block's largest magnitude. The scale
//                is 2^(e - 127 - 2), since E2M1 reaches up to 4 * 1.5; with `rule.bump` e is one
//                more where the mantissa is large. Its bits are (e - 2) << 23, those of its
//                reciprocal (254 - (e - 2)) << 23: no logarithm, no division.
//   3. round     v = |x| * reciprocal. A float has 24 bits of mantissa, so the sum v + 2^22 P, with
//                P the power of two at or below v, has no room for anything finer than P / 2, and
//                that is the distance of the E2M1 numbers at v. So
//                    (v + 2^22 P) - 2^22 P
//                is v rounded to E2M1, ties to even. Below 1 the distance is 1/2: P = max(P, 1).
//                If v has at most 16 significant bits, max(v, 1) itself may stand for P: the sum
//                stays inside its binade and 2^22 v is still a multiple of P / 2.
//                Ties away from zero: the reciprocal is made larger by 2^-20. That lifts a tie and
//                nothing else, for values of at most 16 significant bits.
//   4. scale back, narrow to the input's type (exact), and give the sign back: a rounding by
//                addition turns -0 into +0, and the operator of Ascend 950 does not.
//
// A float input has more than 16 bits. With ties away from zero its lower bits are cut off first:
// a tie has 3 significant bits, so cutting cannot carry a value across one. With ties to even the
// exact P is used.
#pragma once

#include <type_traits>

#include "kernel_operator.h"
#include "npu_qat/mxfp4.h"

namespace npu_qat {

using AscendC::LocalTensor;
using AscendC::RoundMode;

// What the vector unit has computed is there for the next instruction.
__aicore__ inline void Barrier() { AscendC::PipeBarrier<PIPE_V>(); }

__aicore__ inline uint32_t RoundUp(uint32_t value, uint32_t unit) {
    return (value + unit - 1) / unit * unit;
}

// The values of a tile as they lie in the unified buffer: how many there are, and how many there
// are with the last block filled up.
struct Extent {
    uint32_t valid;
    __aicore__ inline uint32_t Padded() const { return RoundUp(valid, kBlock); }
    __aicore__ inline uint32_t Blocks() const { return Padded() / kBlock; }
    // Eight at a time is what Brcb takes.
    __aicore__ inline uint32_t BlocksOfEight() const { return RoundUp(Blocks(), 8); }
    // Values up to a multiple of 32 bytes: what a copy from memory fills.
    template <typename T> __aicore__ inline uint32_t Copied() const {
        return RoundUp(valid, kBlockBytes / sizeof(T));
    }
};

// Multiply each block of 32 `values` by its one of `factors`. `spread` holds 32 bytes a block.
__aicore__ inline void MulByBlock(const LocalTensor<float> &values,
                                  const LocalTensor<float> &factors,
                                  const LocalTensor<float> &spread, uint32_t blocks) {
    // Block stride 0 makes all four 32-byte parts of a block read the same eight factors.
    const AscendC::BinaryRepeatParams oneFactorEach(1, 1, 0, 4, 4, 1);
    AscendC::Brcb(spread, factors, RoundUp(blocks, 8) / 8, {1, 8});
    Barrier();
    for (uint32_t at = 0; at < blocks; at += kMaxRepeat) {
        const uint32_t repeats = blocks - at < kMaxRepeat ? blocks - at : kMaxRepeat;
        const LocalTensor<float> part = values[at * kBlock];
        AscendC::Mul(part, part, spread[at * kFloatsPerBlock], kBlock, repeats, oneFactorEach);
    }
    Barrier();
}

template <typename T> class Mxfp4Tile {
public:
    // `length`: the largest number of values of a tile, a multiple of 256.
    __aicore__ inline void Init(AscendC::TPipe *pipe, uint32_t length, const Mxfp4Rule &rule) {
        rule_ = rule;
        const uint32_t blocks = length / kBlock;
        pipe->InitBuffer(magnitudeBuffer_, length * sizeof(float));
        pipe->InitBuffer(workBuffer_, length * sizeof(float));
        pipe->InitBuffer(largestBuffer_, blocks * sizeof(int32_t));
        pipe->InitBuffer(scaleBuffer_, blocks * sizeof(int32_t));
        pipe->InitBuffer(reciprocalBuffer_, blocks * sizeof(int32_t));
        magnitude_ = magnitudeBuffer_.template Get<float>();
        work_ = workBuffer_.template Get<float>();
        largest_ = largestBuffer_.template Get<int32_t>();
        scale_ = scaleBuffer_.template Get<int32_t>();
        reciprocal_ = reciprocalBuffer_.template Get<int32_t>();
    }

    // out = decode(encode(in)). `in` holds extent.Copied<T>() values, zeros after the valid ones.
    __aicore__ inline void FakeQuant(const LocalTensor<T> &out, const LocalTensor<T> &in,
                                     const Extent &extent) {
        Encode(in, extent);
        MulBlocks(magnitude_, scale_.template ReinterpretCast<float>(), extent.Blocks());
        WriteSigned(out, in, extent);
    }

    // Steps 1 to 3: the E2M1 magnitudes of `in` are in Magnitude(), the scales in Scale().
    __aicore__ inline void Encode(const LocalTensor<T> &in, const Extent &extent) {
        TakeMagnitude(in, extent);
        FindLargest(extent);
        MakeScales(extent.BlocksOfEight());
        MulBlocks(magnitude_, reciprocal_.template ReinterpretCast<float>(), extent.Blocks());
        Round(extent.Padded());
    }

    // Multiply each block of 32 `values` by its one of `factors`; overwrites Work().
    __aicore__ inline void MulBlocks(const LocalTensor<float> &values,
                                     const LocalTensor<float> &factors, uint32_t blocks) {
        MulByBlock(values, factors, work_, blocks);
    }

    // Values of the block scales as float bits, a NaN for a NaN block.
    __aicore__ inline const LocalTensor<int32_t> &Scale() { return scale_; }
    __aicore__ inline const LocalTensor<float> &Magnitude() { return magnitude_; }
    // Free between the calls of this class: a number for each value, and one for each block.
    __aicore__ inline const LocalTensor<float> &Work() { return work_; }
    __aicore__ inline const LocalTensor<int32_t> &BlockWork() { return largest_; }

private:
    static constexpr bool kIsFloat = std::is_same<T, float>::value;

    __aicore__ inline void TakeMagnitude(const LocalTensor<T> &in, const Extent &extent) {
        const uint32_t copied = extent.Copied<T>();
        if constexpr (kIsFloat) {
            AscendC::Abs(magnitude_, in, copied);
        } else {
            AscendC::Cast(magnitude_, in, RoundMode::CAST_NONE, copied);
            Barrier();
            AscendC::Abs(magnitude_, magnitude_, copied);
        }
        if (copied < extent.Padded()) {
            AscendC::Duplicate(magnitude_[copied], 0.0f, extent.Padded() - copied);
        }
        Barrier();
    }

    __aicore__ inline void FindLargest(const Extent &extent) {
        const uint32_t count = extent.Padded();
        const LocalTensor<uint32_t> upper = work_.template ReinterpretCast<uint32_t>();
        AscendC::ShiftRight(upper, magnitude_.template ReinterpretCast<uint32_t>(), 16u, count);
        Barrier();
        if (kIsFloat && rule_.nudge != 0) {
            AscendC::ShiftLeft(magnitude_.template ReinterpretCast<uint32_t>(), upper, 16u, count);
            Barrier();
        }
        AscendC::Cast(work_, work_.template ReinterpretCast<int32_t>(), RoundMode::CAST_RINT, count);
        Barrier();
        const LocalTensor<float> largest = scale_.template ReinterpretCast<float>();  // still unused
        AscendC::Duplicate(largest, 0.0f, extent.BlocksOfEight());
        Barrier();
        for (uint32_t at = 0; at < extent.Blocks(); at += kMaxRepeat) {
            const uint32_t left = extent.Blocks() - at;
            AscendC::WholeReduceMax(largest[at], work_[at * kBlock], kBlock,
                                    left < kMaxRepeat ? left : kMaxRepeat, 1, 1, 4,
                                    AscendC::ReduceOrder::ORDER_ONLY_VALUE);
        }
        Barrier();
        AscendC::Cast(largest_, largest, RoundMode::CAST_RINT, extent.BlocksOfEight());
        Barrier();
    }

    __aicore__ inline void MakeScales(uint32_t blocks) {
        // scale_ = NaN where the largest magnitude says so, else 0.
        AscendC::Adds(scale_, largest_, -rule_.nanAbove, blocks);
        Barrier();
        AscendC::Mins(scale_, scale_, 1, blocks);
        Barrier();
        AscendC::Maxs(scale_, scale_, 0, blocks);
        Barrier();
        AscendC::Muls(scale_, scale_, kNan, blocks);
        // The scale's biased exponent: that of the largest magnitude minus 2.
        const LocalTensor<int32_t> exponent = work_.template ReinterpretCast<int32_t>();
        AscendC::Adds(exponent, largest_, rule_.bump - (2 << 7), blocks);
        Barrier();
        AscendC::ShiftRight(exponent, exponent, 7, blocks);
        Barrier();
        AscendC::Maxs(exponent, exponent, 0, blocks);
        Barrier();
        AscendC::Muls(reciprocal_, exponent, -1, blocks);
        Barrier();
        AscendC::Adds(reciprocal_, reciprocal_, 254, blocks);
        AscendC::ShiftLeft(exponent, exponent, 23, blocks);
        Barrier();
        AscendC::ShiftLeft(reciprocal_, reciprocal_, 23, blocks);
        AscendC::Maxs(exponent, exponent, rule_.tinyScale, blocks);
        Barrier();
        AscendC::Max(scale_, scale_, exponent, blocks);
        Barrier();
        // A scale of 0 (a block too small for the rule) has the reciprocal 0: its codes are +-0.
        AscendC::Mins(exponent, scale_, 1, blocks);
        Barrier();
        AscendC::Mul(reciprocal_, reciprocal_, exponent, blocks);
        Barrier();
        AscendC::Adds(reciprocal_, reciprocal_, static_cast<int32_t>(rule_.nudge), blocks);
        Barrier();
    }

    __aicore__ inline void Round(uint32_t count) {
        AscendC::Mins(magnitude_, magnitude_, kLargest, count);
        Barrier();
        AscendC::Maxs(work_, magnitude_, 1.0f, count);
        Barrier();
        if (kIsFloat && rule_.nudge == 0) {
            const LocalTensor<uint32_t> power = work_.template ReinterpretCast<uint32_t>();
            AscendC::ShiftRight(power, power, 23u, count);
            Barrier();
            AscendC::ShiftLeft(power, power, 23u, count);
            Barrier();
        }
        AscendC::Muls(work_, work_, kCarrier, count);
        Barrier();
        AscendC::Add(magnitude_, magnitude_, work_, count);
        Barrier();
        AscendC::Sub(magnitude_, magnitude_, work_, count);
        Barrier();
    }

    // out = Magnitude() with the signs of `in`, in the type of `in`.
    __aicore__ inline void WriteSigned(const LocalTensor<T> &out, const LocalTensor<T> &in,
                                       const Extent &extent) {
        using Bits = std::conditional_t<kIsFloat, uint32_t, uint16_t>;
        constexpr Bits kSignAt = 8 * sizeof(T) - 1;
        const uint32_t count = extent.Copied<T>();
        const LocalTensor<Bits> sign = work_.template ReinterpretCast<Bits>();
        AscendC::ShiftRight(sign, in.template ReinterpretCast<Bits>(), kSignAt, count);
        if constexpr (!kIsFloat) AscendC::Cast(out, magnitude_, RoundMode::CAST_RINT, count);
        Barrier();
        AscendC::ShiftLeft(sign, sign, kSignAt, count);
        Barrier();
        // Or takes 16 bits at a time.
        const LocalTensor<uint16_t> result = out.template ReinterpretCast<uint16_t>();
        const LocalTensor<uint16_t> bits =
            kIsFloat ? magnitude_.template ReinterpretCast<uint16_t>() : result;
        AscendC::Or(result, bits, work_.template ReinterpretCast<uint16_t>(),
                    count * (sizeof(T) / sizeof(uint16_t)));
        Barrier();
    }

    Mxfp4Rule rule_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> magnitudeBuffer_, workBuffer_, largestBuffer_,
        scaleBuffer_, reciprocalBuffer_;
    LocalTensor<float> magnitude_, work_;
    LocalTensor<int32_t> largest_, scale_, reciprocal_;
};

}  // namespace npu_qat
