// y = decode(encode(x)) in MXFP4, one pass over memory: the kernel to read first.
//
// How an AscendC kernel works. The chip has some 40 vector cores; a launch runs the kernel once on
// each, and GetBlockIdx() says which one it is. A core computes only on its unified buffer (192
// KiB), so it takes its part of x in tiles:
//
//   memory --CopyIn--> unified buffer --Compute--> unified buffer --CopyOut--> memory
//
// The three run on different units at the same time. What orders them are queues: CopyIn puts a
// filled buffer into inQueue_ (EnQue), Compute waits for it there (DeQue) and gives it back
// (FreeTensor), and the same again with outQueue_. With two buffers in each queue the copies of
// one tile run while another is computed. Inside Compute an instruction works on thousands of
// values; Barrier() stands where one needs the result of the one before.
//
// The arithmetic is in mxfp4_tile.h.
#pragma once

#include "mxfp4_tile.h"
#include "work.h"

namespace npu_qat {

constexpr int32_t kBuffers = 2;

template <typename T> class Mxfp4FakeQuant {
public:
    // x, y: T[tiling.rows][tiling.length] in memory.
    __aicore__ inline Mxfp4FakeQuant(AscendC::TPipe *pipe, GM_ADDR x, GM_ADDR y,
                                     const Mxfp4Tiling &tiling)
        : work_(tiling, kTileLength<T>) {
        const uint64_t size = tiling.rows * tiling.length;
        x_.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(x), size);
        y_.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(y), size);
        pipe->InitBuffer(inQueue_, kBuffers, kTileLength<T> * sizeof(T));
        pipe->InitBuffer(outQueue_, kBuffers, kTileLength<T> * sizeof(T));
        mxfp4_.Init(pipe, kTileLength<T>, tiling.rule);
    }

    __aicore__ inline void Process() {
        Tile tile;
        while (work_.Next(&tile)) {
            const uint64_t offset = tile.row * work_.Length() + tile.first;
            Load(offset, tile.valid);
            Compute(tile.valid);
            Store(offset, tile.valid);
        }
    }

private:
    __aicore__ inline void Load(uint64_t offset, uint32_t count) {
        AscendC::LocalTensor<T> in = inQueue_.template AllocTensor<T>();
        CopyIn(in, x_[offset], count);
        inQueue_.EnQue(in);
    }

    __aicore__ inline void Compute(uint32_t count) {
        AscendC::LocalTensor<T> in = inQueue_.template DeQue<T>();
        AscendC::LocalTensor<T> out = outQueue_.template AllocTensor<T>();
        mxfp4_.FakeQuant(out, in, Extent{count});
        outQueue_.EnQue(out);
        inQueue_.FreeTensor(in);
    }

    __aicore__ inline void Store(uint64_t offset, uint32_t count) {
        AscendC::LocalTensor<T> out = outQueue_.template DeQue<T>();
        CopyOut(y_[offset], out, count);
        outQueue_.FreeTensor(out);
    }

    Work work_;
    AscendC::GlobalTensor<T> x_, y_;
    AscendC::TQue<AscendC::TPosition::VECIN, kBuffers> inQueue_;
    AscendC::TQue<AscendC::TPosition::VECOUT, kBuffers> outQueue_;
    Mxfp4Tile<T> mxfp4_;
};

}  // namespace npu_qat
