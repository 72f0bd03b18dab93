// The launches that src/npu.asc defines and binding/ops.cpp calls.
//
// Pointers are addresses of device memory; `stream` is an aclrtStream; `cores` is how many vector
// cores take part. Each puts one kernel on the stream and returns at once.
#pragma once

#include <cstdint>

#include "npu_qat/mxfp4.h"

#define NPU_QAT_DECLARE(suffix)                                                                 \
    void launch_mxfp4_fake_quant_##suffix(uint32_t cores, void *stream, uint8_t *x, uint8_t *y, \
                                          const npu_qat::Mxfp4Tiling &tiling);                  \
    void launch_mxfp4_pack_##suffix(uint32_t cores, void *stream, uint8_t *x, uint8_t *codes,   \
                                    uint8_t *scales, const npu_qat::Mxfp4Tiling &tiling);

#define NPU_QAT_DECLARE_16(suffix)                                                              \
    void launch_mxfp4_dequant_##suffix(uint32_t cores, void *stream, uint8_t *codes,            \
                                       uint8_t *scales, uint8_t *y,                             \
                                       const npu_qat::Mxfp4Tiling &tiling);                     \
    void launch_rms_norm_mxfp4_fake_quant_##suffix(                                             \
        uint32_t cores, void *stream, uint8_t *x, uint8_t *gamma, uint8_t *y, uint8_t *q,       \
        const npu_qat::Mxfp4Tiling &tiling, float epsilon);

NPU_QAT_DECLARE(bf16)
NPU_QAT_DECLARE(fp16)
NPU_QAT_DECLARE(fp32)
NPU_QAT_DECLARE_16(bf16)
NPU_QAT_DECLARE_16(fp16)
