// torch.ops.npu_qat.mxfp4_*: the kernels as PyTorch operators for the NPU (PrivateUse1).
//
// A rule travels as its four numbers (npu_qat/backends/ascendc/rules.py makes them from a
// profile), so that profiles are defined in one place. Blocks run along the last dimension of a
// contiguous tensor.
//
// Launching: torch_npu queues operators on a thread of its own. A kernel that is put on the stream
// right away can overtake operators that still wait in that queue. So the launch is handed to the
// queue (RunOpApiV2), with the stream taken without waiting for it (stream(false)), and the tensors
// are captured by value, which keeps their memory until it has run.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <mutex>
#include <tuple>

#include "acl/acl_rt.h"
#include "npu_qat/launch.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace npu_qat {
namespace {

constexpr int64_t kLongestRow = 8192;  // of the norm kernel, see src/rms_norm_mxfp4_fake_quant.h

uint32_t VectorCores() {
    static const uint32_t cores = [] {
        int32_t device = 0;
        int64_t count = 0;
        TORCH_CHECK(aclrtGetDevice(&device) == ACL_SUCCESS, "npu_qat: no current NPU device");
        TORCH_CHECK(aclrtGetDeviceInfo(device, ACL_DEV_ATTR_VECTOR_CORE_NUM, &count) == ACL_SUCCESS && count > 0,
                    "npu_qat: CANN does not tell the number of vector cores");
        return static_cast<uint32_t>(count);
    }();
    return cores;
}

uint8_t *Address(const at::Tensor &tensor) {
    return static_cast<uint8_t *>(const_cast<void *>(tensor.const_data_ptr()));
}

// The tiling of a tensor whose last dimension holds `length` values.
Mxfp4Tiling TilingOf(const at::Tensor &tensor, int64_t length, at::IntArrayRef rule) {
    TORCH_CHECK(rule.size() == 4, "npu_qat: a rule has 4 numbers, not ", rule.size());
    const int64_t last = tensor.size(-1);
    Mxfp4Tiling tiling;
    tiling.rows = last == 0 ? 0 : tensor.numel() / last;
    tiling.length = length;
    tiling.rule = {static_cast<int32_t>(rule[0]), static_cast<int32_t>(rule[1]),
                   static_cast<int32_t>(rule[2]), static_cast<uint32_t>(rule[3])};
    return tiling;
}

void CheckValues(const at::Tensor &x) {
    TORCH_CHECK(x.dim() >= 1, "npu_qat: x needs at least one dimension, it has shape ", x.sizes());
    const auto type = x.scalar_type();
    TORCH_CHECK(type == at::kBFloat16 || type == at::kHalf || type == at::kFloat,
                "npu_qat: x must be bf16, fp16 or fp32, not ", type);
}

void CheckBytes(const at::Tensor &codes, const at::Tensor &scales, int64_t length) {
    TORCH_CHECK(codes.scalar_type() == at::kByte && scales.scalar_type() == at::kByte,
                "npu_qat: codes and scales must be uint8, not ", codes.scalar_type(), " and ",
                scales.scalar_type());
    TORCH_CHECK(codes.dim() >= 1 && codes.dim() == scales.dim() &&
                    codes.sizes().slice(0, codes.dim() - 1) == scales.sizes().slice(0, scales.dim() - 1) &&
                    codes.size(-1) == (length + 1) / 2 && scales.size(-1) == (length + 31) / 32,
                "npu_qat: rows of ", length, " values have ", (length + 1) / 2, " bytes of codes and ",
                (length + 31) / 32, " of scales, not ", codes.sizes(), " and ", scales.sizes());
}

std::vector<int64_t> WithLast(const at::Tensor &tensor, int64_t last) {
    std::vector<int64_t> shape = tensor.sizes().vec();
    shape.back() = last;
    return shape;
}

// Queue `launch(cores, stream)` behind the operators that were called before it.
template <typename F> void Queue(const char *name, F launch) {
    const uint32_t cores = VectorCores();
    void *stream = c10_npu::getCurrentNPUStream().stream(false);
    at_npu::native::OpCommand::RunOpApiV2(name, [launch, cores, stream]() -> int {
        launch(cores, stream);
        return 0;
    });
}

#define NPU_QAT_BY_TYPE(type, name, ...)                                                        \
    switch (type) {                                                                             \
        case at::kBFloat16: launch_##name##_bf16(__VA_ARGS__); break;                           \
        case at::kHalf: launch_##name##_fp16(__VA_ARGS__); break;                               \
        default: launch_##name##_fp32(__VA_ARGS__);                                             \
    }
#define NPU_QAT_BY_TYPE_16(type, name, ...)                                                     \
    switch (type) {                                                                             \
        case at::kBFloat16: launch_##name##_bf16(__VA_ARGS__); break;                           \
        default: launch_##name##_fp16(__VA_ARGS__);                                             \
    }

// --- shapes: also the operators on the Meta device --------------------------------------------

at::Tensor FakeQuantShape(const at::Tensor &x, at::IntArrayRef) {
    CheckValues(x);
    return at::empty(x.sizes(), x.options());
}

std::tuple<at::Tensor, at::Tensor> PackShape(const at::Tensor &x, at::IntArrayRef) {
    CheckValues(x);
    const auto bytes = x.options().dtype(at::kByte);
    return {at::empty(WithLast(x, (x.size(-1) + 1) / 2), bytes),
            at::empty(WithLast(x, (x.size(-1) + 31) / 32), bytes)};
}

at::Tensor DequantShape(const at::Tensor &codes, const at::Tensor &scales, int64_t length,
                        at::ScalarType dtype) {
    CheckBytes(codes, scales, length);
    TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf,
                "npu_qat: the values must be bf16 or fp16, not ", dtype);
    return at::empty(WithLast(codes, length), codes.options().dtype(dtype));
}

std::tuple<at::Tensor, at::Tensor> NormShape(const at::Tensor &x, const at::Tensor &gamma, double,
                                             at::IntArrayRef) {
    CheckValues(x);
    TORCH_CHECK(x.scalar_type() != at::kFloat, "npu_qat: the norm takes bf16 or fp16, not fp32");
    TORCH_CHECK(gamma.dim() == 1 && gamma.size(0) == x.size(-1) && gamma.scalar_type() == x.scalar_type(),
                "npu_qat: gamma must be a ", x.scalar_type(), " vector of ", x.size(-1),
                " values, not ", gamma.scalar_type(), " ", gamma.sizes());
    TORCH_CHECK(x.size(-1) <= kLongestRow, "npu_qat: the norm takes rows of at most ", kLongestRow,
                " values, not ", x.size(-1));
    return {at::empty(x.sizes(), x.options()), at::empty(x.sizes(), x.options())};
}

// --- on the NPU --------------------------------------------------------------------------------

at::Tensor FakeQuant(const at::Tensor &x, at::IntArrayRef rule) {
    const at::Tensor in = x.contiguous(), out = FakeQuantShape(x, rule);
    const Mxfp4Tiling tiling = TilingOf(in, in.size(-1), rule);
    if (in.numel() == 0) return out;
    Queue("mxfp4_fake_quant", [=](uint32_t cores, void *stream) {
        NPU_QAT_BY_TYPE(in.scalar_type(), mxfp4_fake_quant, cores, stream, Address(in), Address(out), tiling)
    });
    return out;
}

std::tuple<at::Tensor, at::Tensor> Pack(const at::Tensor &x, at::IntArrayRef rule) {
    const at::Tensor in = x.contiguous();
    const auto [codes, scales] = PackShape(x, rule);
    const Mxfp4Tiling tiling = TilingOf(in, in.size(-1), rule);
    if (in.numel() == 0) return {codes, scales};
    Queue("mxfp4_pack", [in, codes = codes, scales = scales, tiling](uint32_t cores, void *stream) {
        NPU_QAT_BY_TYPE(in.scalar_type(), mxfp4_pack, cores, stream, Address(in), Address(codes),
                        Address(scales), tiling)
    });
    return {codes, scales};
}

at::Tensor Dequant(const at::Tensor &codes, const at::Tensor &scales, int64_t length,
                   at::ScalarType dtype) {
    const at::Tensor out = DequantShape(codes, scales, length, dtype);
    const at::Tensor packed = codes.contiguous(), bytes = scales.contiguous();
    const Mxfp4Tiling tiling = TilingOf(out, length, {0, 0, 0, 0});
    if (out.numel() == 0) return out;
    Queue("mxfp4_dequant", [=](uint32_t cores, void *stream) {
        NPU_QAT_BY_TYPE_16(dtype, mxfp4_dequant, cores, stream, Address(packed), Address(bytes),
                           Address(out), tiling)
    });
    return out;
}

std::tuple<at::Tensor, at::Tensor> Norm(const at::Tensor &x, const at::Tensor &gamma,
                                        double epsilon, at::IntArrayRef rule) {
    const at::Tensor in = x.contiguous(), weight = gamma.contiguous();
    const auto [y, q] = NormShape(x, gamma, epsilon, rule);
    const Mxfp4Tiling tiling = TilingOf(in, in.size(-1), rule);
    if (in.numel() == 0) return {y, q};
    Queue("rms_norm_mxfp4_fake_quant", [in, weight, y = y, q = q, tiling, epsilon](uint32_t cores, void *stream) {
        NPU_QAT_BY_TYPE_16(in.scalar_type(), rms_norm_mxfp4_fake_quant, cores, stream, Address(in),
                           Address(weight), Address(y), Address(q), tiling, static_cast<float>(epsilon))
    });
    return {y, q};
}

// --- gradients ---------------------------------------------------------------------------------

// Straight through (Bengio et al., arXiv 1308.3432): rounding counts as the identity.
class StraightThrough : public torch::autograd::Function<StraightThrough> {
public:
    static at::Tensor forward(torch::autograd::AutogradContext *, const at::Tensor &x,
                              at::IntArrayRef rule) {
        at::AutoDispatchBelowADInplaceOrView guard;
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("npu_qat::mxfp4_fake_quant", "")
                                   .typed<at::Tensor(const at::Tensor &, at::IntArrayRef)>();
        return op.call(x, rule);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext *,
                                                   torch::autograd::variable_list grads) {
        return {grads[0], at::Tensor()};
    }
};

at::Tensor FakeQuantAutograd(const at::Tensor &x, at::IntArrayRef rule) {
    return StraightThrough::apply(x, rule);
}

// With n = x r, r = 1 / sqrt(mean(x^2) + epsilon), y = n gamma and g the sum of both gradients (q's
// goes straight through to y):  d gamma = sum over rows of g n;  with h = g gamma,
// dx = r (h - n mean(h n)). In fp32, as the kernel computes.
class NormStraightThrough : public torch::autograd::Function<NormStraightThrough> {
public:
    static torch::autograd::variable_list forward(torch::autograd::AutogradContext *context,
                                                  const at::Tensor &x, const at::Tensor &gamma,
                                                  double epsilon, at::IntArrayRef rule) {
        at::AutoDispatchBelowADInplaceOrView guard;
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("npu_qat::rms_norm_mxfp4_fake_quant", "")
                                   .typed<std::tuple<at::Tensor, at::Tensor>(
                                       const at::Tensor &, const at::Tensor &, double, at::IntArrayRef)>();
        context->save_for_backward({x, gamma});
        context->saved_data["epsilon"] = epsilon;
        const auto [y, q] = op.call(x, gamma, epsilon, rule);
        return {y, q};
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                   torch::autograd::variable_list grads) {
        const auto saved = context->get_saved_variables();
        const at::Tensor x = saved[0].to(at::kFloat), gamma = saved[1].to(at::kFloat);
        const at::Tensor g = grads[0].to(at::kFloat) + grads[1].to(at::kFloat);
        const at::Tensor r =
            (x.square().mean(-1, true) + context->saved_data["epsilon"].toDouble()).rsqrt();
        const at::Tensor n = x * r, h = g * gamma;
        const at::Tensor dx = r * (h - n * (h * n).mean(-1, true));
        const at::Tensor dgamma = (g * n).reshape({-1, x.size(-1)}).sum(0);
        return {dx.to(saved[0].scalar_type()), dgamma.to(saved[1].scalar_type()), at::Tensor(),
                at::Tensor()};
    }
};

std::tuple<at::Tensor, at::Tensor> NormAutograd(const at::Tensor &x, const at::Tensor &gamma,
                                                double epsilon, at::IntArrayRef rule) {
    const auto results = NormStraightThrough::apply(x, gamma, epsilon, rule);
    return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npu_qat, m) {
    m.def("mxfp4_fake_quant(Tensor x, int[] rule) -> Tensor");
    m.def("mxfp4_pack(Tensor x, int[] rule) -> (Tensor codes, Tensor scales)");
    m.def("mxfp4_dequant(Tensor codes, Tensor scales, int length, ScalarType dtype) -> Tensor");
    m.def("rms_norm_mxfp4_fake_quant(Tensor x, Tensor gamma, float epsilon, int[] rule) -> (Tensor y, Tensor q)");
}

TORCH_LIBRARY_IMPL(npu_qat, PrivateUse1, m) {
    m.impl("mxfp4_fake_quant", FakeQuant);
    m.impl("mxfp4_pack", Pack);
    m.impl("mxfp4_dequant", Dequant);
    m.impl("rms_norm_mxfp4_fake_quant", Norm);
}

TORCH_LIBRARY_IMPL(npu_qat, Meta, m) {
    m.impl("mxfp4_fake_quant", FakeQuantShape);
    m.impl("mxfp4_pack", PackShape);
    m.impl("mxfp4_dequant", DequantShape);
    m.impl("rms_norm_mxfp4_fake_quant", NormShape);
}

TORCH_LIBRARY_IMPL(npu_qat, AutogradPrivateUse1, m) {
    m.impl("mxfp4_fake_quant", FakeQuantAutograd);
    m.impl("rms_norm_mxfp4_fake_quant", NormAutograd);
}

}  // namespace npu_qat
