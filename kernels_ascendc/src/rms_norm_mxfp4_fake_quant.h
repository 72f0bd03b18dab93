// y = RMSNorm(x) * gamma and q = decode(encode(y)) in MXFP4, in one pass over x.
//
// In a decoder a norm produces the input of the q, k, v (and gate, up) projections: the 16-bit y
// is what LoRA reads, q what the quantised weights are multiplied with. Noise of AQN lies in
// gamma, so it needs nothing of its own here.
//
// RMSNorm of a row of n values (Zhang and Sennrich, arXiv 1910.07467), rounded where the reference
// model rounds, to the type T of x:
//     y = T(T(x / sqrt(sum(x^2) / n + epsilon)) * gamma)
// The sum is taken in a fixed order: the upper half of the squares is added to the lower half
// until eight are left. So y does not depend on how rows are dealt out to cores.
#pragma once

#include "mxfp4_fake_quant.h"

namespace npu_qat {

constexpr uint32_t kLongestRow = 8192;  // what fits the unified buffer

template <typename T> class RmsNormMxfp4FakeQuant {
public:
    // x, y, q: T[rows][length]; gamma: T[length]; length at most kLongestRow. T: bf16 or fp16.
    __aicore__ inline RmsNormMxfp4FakeQuant(AscendC::TPipe *pipe, GM_ADDR x, GM_ADDR gamma,
                                            GM_ADDR y, GM_ADDR q, const Mxfp4Tiling &tiling,
                                            float epsilon)
        : rows_(Work::Part(tiling.rows)), row_{static_cast<uint32_t>(tiling.length)},
          epsilon_(epsilon) {
        const uint64_t size = tiling.rows * tiling.length;
        const uint32_t room = RoundUp(row_.valid, 256);
        x_.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(x), size);
        y_.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(y), size);
        q_.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(q), size);
        gamma_.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(gamma), tiling.length);
        pipe->InitBuffer(inQueue_, kBuffers, room * sizeof(T));
        pipe->InitBuffer(yQueue_, kBuffers, room * sizeof(T));
        pipe->InitBuffer(qQueue_, kBuffers, room * sizeof(T));
        pipe->InitBuffer(gammaQueue_, 1, room * sizeof(T));
        pipe->InitBuffer(meanBuffer_, kBlockBytes);
        pipe->InitBuffer(spreadBuffer_, kFloatsPerBlock * kBlockBytes);
        mean_ = meanBuffer_.template Get<float>();
        spread_ = spreadBuffer_.template Get<float>();
        mxfp4_.Init(pipe, room, tiling.rule);
    }

    __aicore__ inline void Process() {
        AscendC::LocalTensor<T> gamma = gammaQueue_.template AllocTensor<T>();
        CopyIn(gamma, gamma_, row_.valid);
        gammaQueue_.EnQue(gamma);
        gamma = gammaQueue_.template DeQue<T>();
        for (uint64_t row = rows_.begin; row < rows_.end; ++row) {
            Load(row);
            Compute(gamma);
            Store(row);
        }
        gammaQueue_.FreeTensor(gamma);
    }

private:
    __aicore__ inline void Load(uint64_t row) {
        AscendC::LocalTensor<T> in = inQueue_.template AllocTensor<T>();
        CopyIn(in, x_[row * row_.valid], row_.valid);
        inQueue_.EnQue(in);
    }

    __aicore__ inline void Compute(const AscendC::LocalTensor<T> &gamma) {
        AscendC::LocalTensor<T> in = inQueue_.template DeQue<T>();
        AscendC::LocalTensor<T> y = yQueue_.template AllocTensor<T>();
        AscendC::LocalTensor<T> q = qQueue_.template AllocTensor<T>();
        Normalize(y, in, gamma);
        mxfp4_.FakeQuant(q, y, row_);
        yQueue_.EnQue(y);
        qQueue_.EnQue(q);
        inQueue_.FreeTensor(in);
    }

    __aicore__ inline void Store(uint64_t row) {
        AscendC::LocalTensor<T> y = yQueue_.template DeQue<T>();
        AscendC::LocalTensor<T> q = qQueue_.template DeQue<T>();
        CopyOut(y_[row * row_.valid], y, row_.valid);
        CopyOut(q_[row * row_.valid], q, row_.valid);
        yQueue_.FreeTensor(y);
        qQueue_.FreeTensor(q);
    }

    __aicore__ inline void Normalize(const AscendC::LocalTensor<T> &y,
                                     const AscendC::LocalTensor<T> &in,
                                     const AscendC::LocalTensor<T> &gamma) {
        // Zeros behind the row change neither the sum nor, being multiplied, themselves.
        const uint32_t count = row_.template Copied<T>();
        const LocalTensor<float> value = mxfp4_.Magnitude();
        const LocalTensor<float> work = mxfp4_.Work();
        AscendC::Cast(value, in, RoundMode::CAST_NONE, count);
        Barrier();
        AscendC::Mul(work, value, value, count);
        Barrier();
        Sum(work, count);
        InverseRoot();
        MulAll(value, count);
        AscendC::Cast(y, value, RoundMode::CAST_RINT, count);
        Barrier();
        AscendC::Cast(value, y, RoundMode::CAST_NONE, count);
        AscendC::Cast(work, gamma, RoundMode::CAST_NONE, count);
        Barrier();
        AscendC::Mul(value, value, work, count);
        Barrier();
        AscendC::Cast(y, value, RoundMode::CAST_RINT, count);
        Barrier();
    }

    // mean_[0] = the sum of `count` numbers, which are overwritten.
    __aicore__ inline void Sum(const LocalTensor<float> &numbers, uint32_t count) {
        while (count > kFloatsPerBlock) {
            const uint32_t half = RoundUp((count + 1) / 2, kFloatsPerBlock);
            AscendC::Add(numbers, numbers, numbers[half], count - half);
            Barrier();
            count = half;
        }
        AscendC::Duplicate(mean_, 0.0f, kFloatsPerBlock);
        Barrier();
        AscendC::WholeReduceSum(mean_, numbers, count, 1, 1, 1, 8);
        Barrier();
    }

    // spread_ = eight times 1 / sqrt(mean of the squares + epsilon).
    __aicore__ inline void InverseRoot() {
        AscendC::Muls(mean_, mean_, 1.0f / static_cast<float>(row_.valid), kFloatsPerBlock);
        AscendC::Duplicate(spread_, 1.0f, kFloatsPerBlock);
        Barrier();
        AscendC::Adds(mean_, mean_, epsilon_, kFloatsPerBlock);
        Barrier();
        AscendC::Sqrt(mean_, mean_, kFloatsPerBlock);
        Barrier();
        AscendC::Div(mean_, spread_, mean_, kFloatsPerBlock);
        Barrier();
        AscendC::Brcb(spread_, mean_, 1, {1, 8});
        Barrier();
    }

    // Multiply `count` values, a multiple of 8, by spread_[0].
    __aicore__ inline void MulAll(const LocalTensor<float> &values, uint32_t count) {
        constexpr uint32_t kLanes = 64;
        const AscendC::BinaryRepeatParams sameFactor(1, 1, 0, 8, 8, 0);
        uint32_t at = 0;
        while (count - at >= kLanes) {
            const uint32_t repeats = (count - at) / kLanes;
            const uint32_t now = repeats < kMaxRepeat ? repeats : kMaxRepeat;
            AscendC::Mul(values[at], values[at], spread_, kLanes, now, sameFactor);
            at += now * kLanes;
        }
        if (at < count) AscendC::Mul(values[at], values[at], spread_, count - at, 1, sameFactor);
        Barrier();
    }

    Share rows_;
    Extent row_;
    float epsilon_;
    AscendC::GlobalTensor<T> x_, y_, q_, gamma_;
    AscendC::TQue<AscendC::TPosition::VECIN, kBuffers> inQueue_;
    AscendC::TQue<AscendC::TPosition::VECIN, 1> gammaQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, kBuffers> yQueue_, qQueue_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> meanBuffer_, spreadBuffer_;
    LocalTensor<float> mean_, spread_;
    Mxfp4Tile<T> mxfp4_;
};

}  // namespace npu_qat
