// Launches on the host model, as C functions that Python's ctypes can call.
#include "../src/entries.h"

using npu_qat::Mxfp4Tiling;
using npu_qat_host::Launch;

#define NPU_QAT_LAUNCHES(suffix)                                                                \
    extern "C" void launch_mxfp4_fake_quant_##suffix(int64_t cores, GM_ADDR x, GM_ADDR y,       \
                                                     const Mxfp4Tiling *tiling) {               \
        Launch(cores, [&] { mxfp4_fake_quant_##suffix(x, y, *tiling); });                       \
    }                                                                                           \
    extern "C" void launch_mxfp4_pack_##suffix(int64_t cores, GM_ADDR x, GM_ADDR codes,         \
                                               GM_ADDR scales, const Mxfp4Tiling *tiling) {     \
        Launch(cores, [&] { mxfp4_pack_##suffix(x, codes, scales, *tiling); });                 \
    }

#define NPU_QAT_LAUNCHES_16(suffix)                                                             \
    extern "C" void launch_mxfp4_dequant_##suffix(int64_t cores, GM_ADDR codes, GM_ADDR scales, \
                                                  GM_ADDR y, const Mxfp4Tiling *tiling) {       \
        Launch(cores, [&] { mxfp4_dequant_##suffix(codes, scales, y, *tiling); });              \
    }                                                                                           \
    extern "C" void launch_rms_norm_mxfp4_fake_quant_##suffix(                                  \
        int64_t cores, GM_ADDR x, GM_ADDR gamma, GM_ADDR y, GM_ADDR q,                          \
        const Mxfp4Tiling *tiling, float epsilon) {                                             \
        Launch(cores, [&] {                                                                     \
            rms_norm_mxfp4_fake_quant_##suffix(x, gamma, y, q, *tiling, epsilon);               \
        });                                                                                     \
    }

NPU_QAT_LAUNCHES(bf16)
NPU_QAT_LAUNCHES(fp16)
NPU_QAT_LAUNCHES(fp32)
NPU_QAT_LAUNCHES_16(bf16)
NPU_QAT_LAUNCHES_16(fp16)

// Since the library was loaded: passes of vector instructions over 256 bytes, bytes copied.
extern "C" uint64_t vector_repeats() { return npu_qat_host::ThisCore().repeats; }
extern "C" uint64_t bytes_copied() { return npu_qat_host::ThisCore().copied; }
