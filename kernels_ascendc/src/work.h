// Who does what: the runs of a tensor are dealt out to the cores and cut into tiles.
//
// If a run is a whole number of blocks, the runs of a tensor are one long run, and each core gets
// an equal number of blocks of it. Otherwise the last block of a run ends with the run, and each
// core gets whole runs. The number of cores is that of the launch; nothing here assumes one.
#pragma once

#include "kernel_operator.h"
#include "npu_qat/mxfp4.h"

namespace npu_qat {

// Values [first, first + valid) of run `row`.
struct Tile {
    uint64_t row;
    uint64_t first;
    uint32_t valid;
};

class Work {
public:
    __aicore__ inline Work(const Mxfp4Tiling &tiling, uint32_t tileLength)
        : rows_(tiling.rows), length_(tiling.length), tileLength_(tileLength) {
        if (length_ % kBlock == 0) {
            length_ *= rows_;
            rows_ = 1;
        }
        const bool byRow = rows_ > 1;
        const Share mine = Part(byRow ? rows_ : (length_ + kBlock - 1) / kBlock);
        row_ = byRow ? mine.begin : 0;
        lastRow_ = byRow ? mine.end : (mine.begin < mine.end ? 1 : 0);
        begin_ = byRow ? 0 : mine.begin * kBlock;
        end_ = byRow ? length_ : Smaller(mine.end * kBlock, length_);
        at_ = begin_;
    }

    // The next tile of this core, false after the last.
    __aicore__ inline bool Next(Tile *tile) {
        if (row_ >= lastRow_) return false;
        const uint64_t left = end_ - at_;
        tile->row = row_;
        tile->first = at_;
        tile->valid = static_cast<uint32_t>(Smaller(left, tileLength_));
        at_ += tile->valid;
        if (at_ == end_) {
            at_ = begin_;
            ++row_;
        }
        return true;
    }

    // Of the tensor as it is cut here.
    __aicore__ inline uint64_t Length() const { return length_; }

    // This core's part of `total` equal pieces.
    __aicore__ static inline Share Part(uint64_t total) {
        const uint64_t cores = AscendC::GetBlockNum();
        const uint64_t each = (total + cores - 1) / cores;
        const uint64_t begin = each * AscendC::GetBlockIdx();
        return {Smaller(begin, total), Smaller(begin + each, total)};
    }

private:
    __aicore__ static inline uint64_t Smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

    uint64_t rows_, length_;
    uint32_t tileLength_;
    uint64_t row_, lastRow_, begin_, end_, at_;
};

// Copies of `count` values between memory and the unified buffer. Lengths are in bytes on the
// chip, and what lies behind them up to a multiple of 32 bytes is filled with zeros.
template <typename T>
__aicore__ inline void CopyIn(const AscendC::LocalTensor<T> &local,
                              const AscendC::GlobalTensor<T> &global, uint32_t count) {
    constexpr uint32_t kUnit = kBlockBytes / sizeof(T);
    const uint8_t fill = (kUnit - count % kUnit) % kUnit;
    const AscendC::DataCopyExtParams copy(1, count * sizeof(T), 0, 0, 0);
    const AscendC::DataCopyPadExtParams<T> zeros(fill != 0, 0, fill, T{});
    AscendC::DataCopyPad(local, global, copy, zeros);
}

template <typename T>
__aicore__ inline void CopyOut(const AscendC::GlobalTensor<T> &global,
                               const AscendC::LocalTensor<T> &local, uint32_t count) {
    const AscendC::DataCopyExtParams copy(1, count * sizeof(T), 0, 0, 0);
    AscendC::DataCopyPad(global, local, copy);
}

}  // namespace npu_qat
