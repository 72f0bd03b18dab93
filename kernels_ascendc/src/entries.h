// The kernels as a launch calls them: one function for each kernel and type of value.
//
// Included by npu.asc, where __global__ makes them kernels of the chip, and by host.cpp, where they
// are plain functions.
#pragma once

#include "mxfp4_dequant.h"
#include "mxfp4_fake_quant.h"
#include "mxfp4_pack.h"
#include "rms_norm_mxfp4_fake_quant.h"

// npu.asc adds that these kernels run on the vector cores only.
#ifndef NPU_QAT_KERNEL
#define NPU_QAT_KERNEL __global__ __aicore__
#endif

#define NPU_QAT_ENTRIES(suffix, T)                                                              \
    extern "C" NPU_QAT_KERNEL void mxfp4_fake_quant_##suffix(                                   \
        GM_ADDR x, GM_ADDR y, npu_qat::Mxfp4Tiling tiling) {                                    \
        AscendC::TPipe pipe;                                                                    \
        npu_qat::Mxfp4FakeQuant<T>(&pipe, x, y, tiling).Process();                              \
    }                                                                                           \
    extern "C" NPU_QAT_KERNEL void mxfp4_pack_##suffix(                                         \
        GM_ADDR x, GM_ADDR codes, GM_ADDR scales, npu_qat::Mxfp4Tiling tiling) {                \
        AscendC::TPipe pipe;                                                                    \
        npu_qat::Mxfp4Pack<T>(&pipe, x, codes, scales, tiling).Process();                       \
    }

// Kernels that write 16-bit values only.
#define NPU_QAT_ENTRIES_16(suffix, T)                                                           \
    extern "C" NPU_QAT_KERNEL void mxfp4_dequant_##suffix(                                      \
        GM_ADDR codes, GM_ADDR scales, GM_ADDR y, npu_qat::Mxfp4Tiling tiling) {                \
        AscendC::TPipe pipe;                                                                    \
        npu_qat::Mxfp4Dequant<T>(&pipe, codes, scales, y, tiling).Process();                    \
    }                                                                                           \
    extern "C" NPU_QAT_KERNEL void rms_norm_mxfp4_fake_quant_##suffix(                          \
        GM_ADDR x, GM_ADDR gamma, GM_ADDR y, GM_ADDR q, npu_qat::Mxfp4Tiling tiling,            \
        float epsilon) {                                                                        \
        AscendC::TPipe pipe;                                                                    \
        npu_qat::RmsNormMxfp4FakeQuant<T>(&pipe, x, gamma, y, q, tiling, epsilon).Process();    \
    }

NPU_QAT_ENTRIES(bf16, bfloat16_t)
NPU_QAT_ENTRIES(fp16, half)
NPU_QAT_ENTRIES(fp32, float)
NPU_QAT_ENTRIES_16(bf16, bfloat16_t)
NPU_QAT_ENTRIES_16(fp16, half)
