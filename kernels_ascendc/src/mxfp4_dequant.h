// Values of packed MXFP4: what mxfp4_pack.h writes, back in 16 bits.
//
// A base that training never changes is stored in 4.25 bits a value and unpacked when it is needed.
// Two codes share a byte, and the chip has no instruction that takes them apart, so the numbers
// are spread the way mxfp4_pack.h puts them together: one number of 16 bits becomes a 32-bit one,
// its upper half is moved up by a shift, and read as 16-bit numbers there are two.
//
// The magnitude of code m = 0..7 is (m + max(m - 4, 0) + 2 max(m - 6, 0)) / 2, a line with two
// bends: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
#pragma once

#include "mxfp4_fake_quant.h"

namespace npu_qat {

template <typename T> class Mxfp4Dequant {
public:
    // codes: uint8[rows][ceil(length / 2)]; scales: uint8[rows][ceil(length / 32)]; y: T[rows][length].
    __aicore__ inline Mxfp4Dequant(AscendC::TPipe *pipe, GM_ADDR codes, GM_ADDR scales, GM_ADDR y,
                                   const Mxfp4Tiling &tiling)
        : work_(tiling, kTile) {
        codes_.SetGlobalBuffer(codes, tiling.rows * ((tiling.length + 1) / 2));
        scales_.SetGlobalBuffer(scales, tiling.rows * ((tiling.length + kBlock - 1) / kBlock));
        y_.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(y), tiling.rows * tiling.length);
        pipe->InitBuffer(codeQueue_, kBuffers, kTile / 2);
        pipe->InitBuffer(scaleQueue_, kBuffers, kTile / kBlock);
        pipe->InitBuffer(outQueue_, kBuffers, kTile * sizeof(T));
        pipe->InitBuffer(codeBuffer_, kTile * sizeof(float));
        pipe->InitBuffer(valueBuffer_, kTile * sizeof(float));
        pipe->InitBuffer(bendBuffer_, kTile * sizeof(float));
        pipe->InitBuffer(factorBuffer_, kTile / kBlock * sizeof(int32_t));
        code_ = codeBuffer_.Get<int32_t>();
        value_ = valueBuffer_.Get<float>();
        bend_ = bendBuffer_.Get<float>();
        factor_ = factorBuffer_.Get<int32_t>();
    }

    __aicore__ inline void Process() {
        Tile tile;
        while (work_.Next(&tile)) {
            const uint64_t length = work_.Length();
            const Extent extent{tile.valid};
            Load(tile.row * ((length + 1) / 2) + tile.first / 2,
                 tile.row * ((length + kBlock - 1) / kBlock) + tile.first / kBlock, extent);
            Compute(extent);
            Store(tile.row * length + tile.first, extent);
        }
    }

private:
    static constexpr uint32_t kTile = 4096;

    __aicore__ inline void Load(uint64_t codeOffset, uint64_t scaleOffset, const Extent &extent) {
        AscendC::LocalTensor<uint8_t> codes = codeQueue_.template AllocTensor<uint8_t>();
        AscendC::LocalTensor<uint8_t> scales = scaleQueue_.template AllocTensor<uint8_t>();
        CopyIn(codes, codes_[codeOffset], (extent.valid + 1) / 2);
        CopyIn(scales, scales_[scaleOffset], extent.Blocks());
        codeQueue_.EnQue(codes);
        scaleQueue_.EnQue(scales);
    }

    __aicore__ inline void Compute(const Extent &extent) {
        AscendC::LocalTensor<uint8_t> codes = codeQueue_.template DeQue<uint8_t>();
        AscendC::LocalTensor<uint8_t> scales = scaleQueue_.template DeQue<uint8_t>();
        AscendC::LocalTensor<T> out = outQueue_.template AllocTensor<T>();
        SpreadScales(scales, extent.BlocksOfEight());
        SpreadCodes(codes, extent.Padded());
        Magnitudes(extent.Padded());
        MulScales(extent.Blocks());
        WriteSigned(out, extent.Padded());
        outQueue_.EnQue(out);
        codeQueue_.FreeTensor(codes);
        scaleQueue_.FreeTensor(scales);
    }

    __aicore__ inline void Store(uint64_t offset, const Extent &extent) {
        AscendC::LocalTensor<T> out = outQueue_.template DeQue<T>();
        CopyOut(y_[offset], out, extent.valid);
        outQueue_.FreeTensor(out);
    }

    // code_ = `count` int16 as int32.
    __aicore__ inline void Widen(const AscendC::LocalTensor<int16_t> &words, uint32_t count) {
        AscendC::Cast(value_, words, RoundMode::CAST_NONE, count);
        Barrier();
        AscendC::Cast(code_, value_, RoundMode::CAST_RINT, count);
        Barrier();
    }

    // code_ holds `count` int32 of which the lower 2 * bits bits count. Afterwards it holds twice
    // as many int16 of `bits` bits each, the lower half of each number first.
    template <uint32_t bits> __aicore__ inline void Split(uint32_t count) {
        const LocalTensor<uint32_t> number = code_.template ReinterpretCast<uint32_t>();
        const LocalTensor<uint32_t> lower = value_.template ReinterpretCast<uint32_t>();
        AscendC::ShiftLeft(lower, number, 32 - bits, count);
        Barrier();
        AscendC::ShiftLeft(number, number, 32 - 2 * bits, count);
        Barrier();
        AscendC::ShiftRight(lower, lower, 32 - bits, count);
        AscendC::ShiftRight(number, number, 32 - bits, count);
        Barrier();
        AscendC::ShiftLeft(number, number, 16u, count);
        Barrier();
        AscendC::Add(code_, code_, lower.template ReinterpretCast<int32_t>(), count);
        Barrier();
    }

    // code_ = the codes of all values, one an int16.
    __aicore__ inline void SpreadCodes(const AscendC::LocalTensor<uint8_t> &codes, uint32_t count) {
        Widen(codes.template ReinterpretCast<int16_t>(), count / 4);
        Split<8>(count / 4);
        Widen(code_.template ReinterpretCast<int16_t>(), count / 2);
        Split<4>(count / 2);
    }

    // factor_ = the scales as float bits.
    __aicore__ inline void SpreadScales(const AscendC::LocalTensor<uint8_t> &scales,
                                        uint32_t blocks) {
        Widen(scales.template ReinterpretCast<int16_t>(), blocks / 2);
        Split<8>(blocks / 2);
        Widen(code_.template ReinterpretCast<int16_t>(), blocks);
        // 255 becomes NaN, 0 becomes 2^-127, all others are the exponent.
        const LocalTensor<int32_t> nan = value_.template ReinterpretCast<int32_t>();
        AscendC::Adds(nan, code_, -254, blocks);
        Barrier();
        AscendC::Maxs(nan, nan, 0, blocks);
        AscendC::ShiftLeft(factor_, code_, 23, blocks);
        Barrier();
        AscendC::Muls(nan, nan, kNan, blocks);
        AscendC::Maxs(factor_, factor_, kHalfScale, blocks);
        Barrier();
        AscendC::Max(factor_, factor_, nan, blocks);
        Barrier();
    }

    // value_ = the magnitudes of the codes in code_.
    __aicore__ inline void Magnitudes(uint32_t count) {
        const LocalTensor<uint16_t> code = code_.template ReinterpretCast<uint16_t>();
        const LocalTensor<uint16_t> index = bend_.template ReinterpretCast<uint16_t>();
        AscendC::ShiftLeft(index, code, static_cast<uint16_t>(13), count);  // the sign falls out
        Barrier();
        AscendC::ShiftRight(index, index, static_cast<uint16_t>(13), count);
        Barrier();
        AscendC::Cast(value_, index.template ReinterpretCast<int16_t>(), RoundMode::CAST_NONE, count);
        Barrier();
        AscendC::Adds(bend_, value_, -6.0f, count);
        Barrier();
        AscendC::Maxs(bend_, bend_, 0.0f, count);
        Barrier();
        AscendC::Muls(bend_, bend_, 2.0f, count);
        Barrier();
        AscendC::Add(bend_, bend_, value_, count);
        Barrier();
        AscendC::Maxs(value_, value_, 4.0f, count);  // max(m - 4, 0) = max(m, 4) - 4
        Barrier();
        AscendC::Add(value_, value_, bend_, count);
        Barrier();
        AscendC::Adds(value_, value_, -4.0f, count);
        Barrier();
        AscendC::Muls(value_, value_, 0.5f, count);
        Barrier();
    }

    // value_ times the scale of its block.
    __aicore__ inline void MulScales(uint32_t blocks) {
        MulByBlock(value_, factor_.template ReinterpretCast<float>(), bend_, blocks);
    }

    // out = value_ with the signs of the codes.
    __aicore__ inline void WriteSigned(const AscendC::LocalTensor<T> &out, uint32_t count) {
        const LocalTensor<uint16_t> code = code_.template ReinterpretCast<uint16_t>();
        AscendC::ShiftRight(code, code, static_cast<uint16_t>(3), count);
        AscendC::Cast(out, value_, RoundMode::CAST_RINT, count);
        Barrier();
        AscendC::ShiftLeft(code, code, static_cast<uint16_t>(15), count);
        Barrier();
        const LocalTensor<uint16_t> result = out.template ReinterpretCast<uint16_t>();
        AscendC::Or(result, result, code, count);
        Barrier();
    }

    Work work_;
    AscendC::GlobalTensor<uint8_t> codes_, scales_;
    AscendC::GlobalTensor<T> y_;
    AscendC::TQue<AscendC::TPosition::VECIN, kBuffers> codeQueue_, scaleQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, kBuffers> outQueue_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> codeBuffer_, valueBuffer_, bendBuffer_,
        factorBuffer_;
    LocalTensor<int32_t> code_, factor_;
    LocalTensor<float> value_, bend_;
};

}  // namespace npu_qat
