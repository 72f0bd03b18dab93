// MXFP4 codes and scale bytes of x: the storage format, 4.25 bits a value.
//
// codes: two a byte along a run, the first in the low half, ceil(length / 2) bytes a run.
// scales: one byte a block of 32, ceil(length / 32) a run; 255 marks a block that is NaN, whose codes
// are 0.
//
// A code is the sign and the index of the magnitude in 0, 0.5, 1, 1.5, 2, 3, 4, 6. From 1 on the
// index is what stands in the float's bits: (bits >> 22) - 252, exponent and one bit of mantissa.
// Below, it is twice the value. The chip has no instruction that puts 4-bit numbers together, but
// two 16-bit numbers side by side are one 32-bit number, so a shift and an addition do it: see
// PairUp.
#pragma once

#include "mxfp4_fake_quant.h"

namespace npu_qat {

template <typename T> class Mxfp4Pack {
public:
    // x: T[rows][length]; codes: uint8[rows][ceil(length / 2)]; scales: uint8[rows][ceil(length / 32)].
    __aicore__ inline Mxfp4Pack(AscendC::TPipe *pipe, GM_ADDR x, GM_ADDR codes, GM_ADDR scales,
                                const Mxfp4Tiling &tiling)
        : work_(tiling, kTile) {
        x_.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(x), tiling.rows * tiling.length);
        codes_.SetGlobalBuffer(codes, tiling.rows * ((tiling.length + 1) / 2));
        scales_.SetGlobalBuffer(scales, tiling.rows * ((tiling.length + kBlock - 1) / kBlock));
        pipe->InitBuffer(inQueue_, kBuffers, kTile * sizeof(T));
        pipe->InitBuffer(codeQueue_, kBuffers, kTile / 2);
        pipe->InitBuffer(scaleQueue_, kBuffers, kTile / kBlock);
        pipe->InitBuffer(pairBuffer_, kTile * sizeof(float));
        pipe->InitBuffer(wordBuffer_, kTile * sizeof(int16_t));
        pair_ = pairBuffer_.template Get<int32_t>();
        word_ = wordBuffer_.template Get<int16_t>();
        mxfp4_.Init(pipe, kTile, tiling.rule);
    }

    __aicore__ inline void Process() {
        Tile tile;
        while (work_.Next(&tile)) {
            const uint64_t length = work_.Length();
            Load(tile.row * length + tile.first, tile.valid);
            Compute(Extent{tile.valid});
            // Tiles begin at whole blocks, so at whole bytes.
            Store(tile.row * ((length + 1) / 2) + tile.first / 2,
                  tile.row * ((length + kBlock - 1) / kBlock) + tile.first / kBlock,
                  Extent{tile.valid});
        }
    }

private:
    static constexpr uint32_t kTile = 4096;

    __aicore__ inline void Load(uint64_t offset, uint32_t count) {
        AscendC::LocalTensor<T> in = inQueue_.template AllocTensor<T>();
        CopyIn(in, x_[offset], count);
        inQueue_.EnQue(in);
    }

    __aicore__ inline void Compute(const Extent &extent) {
        AscendC::LocalTensor<T> in = inQueue_.template DeQue<T>();
        AscendC::LocalTensor<uint8_t> codes = codeQueue_.template AllocTensor<uint8_t>();
        AscendC::LocalTensor<uint8_t> scales = scaleQueue_.template AllocTensor<uint8_t>();
        mxfp4_.Encode(in, extent);
        MakeCodes(in, extent);
        PairUp<4>(extent.Padded());
        PairUp<8>(extent.Padded() / 2);
        Write16(codes, extent.Padded() / 4);
        MakeScaleBytes(extent.BlocksOfEight());
        PairUp<8>(extent.BlocksOfEight());
        Write16(scales, extent.BlocksOfEight() / 2);
        codeQueue_.EnQue(codes);
        scaleQueue_.EnQue(scales);
        inQueue_.FreeTensor(in);
    }

    __aicore__ inline void Store(uint64_t codeOffset, uint64_t scaleOffset, const Extent &extent) {
        AscendC::LocalTensor<uint8_t> codes = codeQueue_.template DeQue<uint8_t>();
        AscendC::LocalTensor<uint8_t> scales = scaleQueue_.template DeQue<uint8_t>();
        CopyOut(codes_[codeOffset], codes, (extent.valid + 1) / 2);
        CopyOut(scales_[scaleOffset], scales, extent.Blocks());
        codeQueue_.FreeTensor(codes);
        scaleQueue_.FreeTensor(scales);
    }

    // pair_ = the codes 0..15 of all values, one an int32.
    __aicore__ inline void MakeCodes(const AscendC::LocalTensor<T> &in, const Extent &extent) {
        const uint32_t count = extent.Padded();
        const LocalTensor<float> magnitude = mxfp4_.Magnitude();
        const LocalTensor<int32_t> upper = mxfp4_.Work().template ReinterpretCast<int32_t>();
        AscendC::ShiftRight(upper, magnitude.template ReinterpretCast<int32_t>(), 22, count);
        Barrier();
        AscendC::Adds(upper, upper, -252, count);
        AscendC::Muls(magnitude, magnitude, 2.0f, count);
        Barrier();
        AscendC::Mins(magnitude, magnitude, 1.0f, count);
        Barrier();
        AscendC::Cast(pair_, magnitude, RoundMode::CAST_RINT, count);
        Barrier();
        AscendC::Max(pair_, pair_, upper, count);
        Barrier();
        AddSigns(in, extent);
        ClearNanBlocks(extent);
    }

    // Codes of negative numbers are larger by 8.
    __aicore__ inline void AddSigns(const AscendC::LocalTensor<T> &in, const Extent &extent) {
        const uint32_t count = extent.template Copied<T>();
        const LocalTensor<uint32_t> sign = mxfp4_.Work().template ReinterpretCast<uint32_t>();
        if constexpr (std::is_same<T, float>::value) {
            AscendC::ShiftRight(sign, in.template ReinterpretCast<uint32_t>(), 31u, count);
        } else {
            AscendC::Cast(mxfp4_.Work(), in, RoundMode::CAST_NONE, count);
            Barrier();
            AscendC::ShiftRight(sign, sign, 31u, count);
        }
        Barrier();
        AscendC::ShiftLeft(sign, sign, 3u, count);
        Barrier();
        AscendC::Add(pair_, pair_, sign.template ReinterpretCast<int32_t>(), count);
        Barrier();
    }

    __aicore__ inline void ClearNanBlocks(const Extent &extent) {
        // A scale's bits are below those of NaN, so the difference to them is 0 only for NaN.
        const uint32_t blocks = extent.BlocksOfEight();
        const LocalTensor<float> codes = pair_.template ReinterpretCast<float>();
        const LocalTensor<int32_t> keep = mxfp4_.BlockWork();
        const LocalTensor<float> factor = keep.template ReinterpretCast<float>();
        AscendC::Muls(keep, mxfp4_.Scale(), -1, blocks);
        AscendC::Cast(codes, pair_, RoundMode::CAST_RINT, extent.Padded());
        Barrier();
        AscendC::Adds(keep, keep, kNan, blocks);
        Barrier();
        AscendC::Mins(keep, keep, 1, blocks);
        Barrier();
        AscendC::Cast(factor, keep, RoundMode::CAST_RINT, blocks);
        Barrier();
        mxfp4_.MulBlocks(codes, factor, extent.Blocks());
        AscendC::Cast(pair_, codes, RoundMode::CAST_RINT, extent.Padded());
        Barrier();
    }

    // pair_ = the scale bytes, one an int32: the exponent in the scale's float bits (NaN: 255).
    __aicore__ inline void MakeScaleBytes(uint32_t blocks) {
        AscendC::ShiftRight(pair_, mxfp4_.Scale(), 23, blocks);
        Barrier();
    }

    // pair_ holds `count` numbers of `bits` bits. Afterwards it holds half as many of twice the
    // bits, neighbours put together with the first one in the lower half (signed if 16 bits).
    template <int32_t bits> __aicore__ inline void PairUp(uint32_t count) {
        ToWords(count);
        const LocalTensor<int32_t> both = word_.template ReinterpretCast<int32_t>();
        const LocalTensor<int32_t> second = mxfp4_.Work().template ReinterpretCast<int32_t>();
        AscendC::ShiftRight(second, both, 16 - bits, count / 2);
        Barrier();
        AscendC::Add(pair_, both, second, count / 2);
        Barrier();
        // What is above 2 * bits bits is left over from the second number.
        AscendC::ShiftLeft(pair_, pair_, 32 - 2 * bits, count / 2);
        Barrier();
        if constexpr (2 * bits == 16) {
            AscendC::ShiftRight(pair_, pair_, 16, count / 2);
        } else {
            const LocalTensor<uint32_t> logical = pair_.template ReinterpretCast<uint32_t>();
            AscendC::ShiftRight(logical, logical, 32u - 2 * bits, count / 2);
        }
        Barrier();
    }

    // word_ = pair_ as int16; the chip goes from int32 to int16 by way of float.
    __aicore__ inline void ToWords(uint32_t count) {
        AscendC::Cast(mxfp4_.Work(), pair_, RoundMode::CAST_RINT, count);
        Barrier();
        AscendC::Cast(word_, mxfp4_.Work(), RoundMode::CAST_RINT, count);
        Barrier();
    }

    // Bytes = pair_ as `count` int16.
    __aicore__ inline void Write16(const AscendC::LocalTensor<uint8_t> &bytes, uint32_t count) {
        AscendC::Cast(mxfp4_.Work(), pair_, RoundMode::CAST_RINT, count);
        Barrier();
        AscendC::Cast(bytes.template ReinterpretCast<int16_t>(), mxfp4_.Work(),
                      RoundMode::CAST_RINT, count);
        Barrier();
    }

    Work work_;
    AscendC::GlobalTensor<T> x_;
    AscendC::GlobalTensor<uint8_t> codes_, scales_;
    AscendC::TQue<AscendC::TPosition::VECIN, kBuffers> inQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, kBuffers> codeQueue_, scaleQueue_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> pairBuffer_, wordBuffer_;
    LocalTensor<int32_t> pair_;
    LocalTensor<int16_t> word_;
    Mxfp4Tile<T> mxfp4_;
};

}  // namespace npu_qat
