// A model of the AscendC vector API on a CPU, for tests only.
//
// The kernels in ../src include "kernel_operator.h". On the NPU that is CANN's; in tests it is this
// file, so that the very same source compiles with a C++ compiler and runs, one core after another.
// Each function computes what CANN's documentation says of the instruction on dav-2201 (A2, A3).
//
// It is strict where the chip is, so that a test fails here and not on the chip:
//   * the unified buffer has 192 KiB, of which a kernel may take 184 (the rest is scratch of some
//     of CANN's instructions); addresses are multiples of 32 bytes; accesses stay inside;
//   * memory nobody wrote is NaN (all bits set), so is a queue's buffer after it was freed;
//   * queues: depth, freeing twice, taking from an empty one;
//   * limits of an instruction: repeats, mask, data types, rounding modes;
//   * two vector instructions of which one needs the other's result stand on both sides of a
//     PipeBarrier<PIPE_V>.
// It cannot show: races between the chip's pipelines other than that one, time, bank conflicts,
// how the chip's comparisons treat NaN, and whether it flushes subnormal floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <type_traits>
#include <vector>

#define __global__
#define __aicore__
#define __gm__
#define GM_ADDR uint8_t *

#define NPU_QAT_CHECK(condition)                                                                \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            std::fprintf(stderr, "%s:%d: not allowed on the chip: %s\n", __FILE__, __LINE__,    \
                         #condition);                                                           \
            std::abort();                                                                       \
        }                                                                                       \
    } while (0)

// --- the two 16-bit floating types ---------------------------------------------------------

namespace npu_qat_host {

template <typename To, typename From> inline To BitCast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// Nearest, ties to even. Works on the bits, so that it does not depend on the compiler.
inline uint16_t FloatToBf16(float value) {
    const uint32_t bits = BitCast<uint32_t>(value);
    if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float HalfToFloat(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3FF;
    if (exponent == 31) return BitCast<float>(sign | 0x7F800000u | (mantissa << 13));
    if (exponent == 0) {
        const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -magnitude : magnitude;
    }
    return BitCast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t FloatToHalf(float value) {
    const uint32_t sign = (BitCast<uint32_t>(value) >> 16) & 0x8000u;
    if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7E00);
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
    const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -24, -14);
    const float steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // exact, then ties even
    const float rounded = std::ldexp(steps, exponent - 10);
    if (rounded < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded * 0x1p24f));
    const uint32_t bits = BitCast<uint32_t>(rounded);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)));
}

}  // namespace npu_qat_host

struct bfloat16_t {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

// --- a core ----------------------------------------------------------------------------------

namespace npu_qat_host {

constexpr uint32_t kUnifiedBuffer = 184 * 1024;

struct Range {
    const uint8_t *begin;
    const uint8_t *end;
    bool Overlaps(const Range &other) const { return begin < other.end && other.begin < end; }
};

struct Core {
    alignas(32) uint8_t unifiedBuffer[kUnifiedBuffer];
    uint32_t used = 0;
    int64_t index = 0;
    int64_t count = 1;
    std::vector<Range> reads, writes;  // of vector instructions since the last barrier
    uint64_t repeats = 0;  // of vector instructions, 256 bytes each, over all launches
    uint64_t copied = 0;   // bytes from and to memory, over all launches

    void Reset(int64_t index_, int64_t count_) {
        std::memset(unifiedBuffer, 0xFF, sizeof(unifiedBuffer));
        used = 0;
        index = index_;
        count = count_;
        reads.clear();
        writes.clear();
    }
    bool Owns(const uint8_t *begin, const uint8_t *end) const {
        return begin >= unifiedBuffer && begin <= end && end <= unifiedBuffer + used;
    }
};

inline Core &ThisCore() {
    static Core core;
    return core;
}

// Run `kernel` once for every core, as a launch does.
template <typename Kernel> void Launch(int64_t cores, Kernel kernel) {
    for (int64_t i = 0; i < cores; ++i) {
        ThisCore().Reset(i, cores);
        kernel();
    }
}

}  // namespace npu_qat_host

namespace AscendC {

enum class TPosition { GM, VECIN, VECOUT, VECCALC, LCM };
enum class RoundMode { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };
}  // namespace AscendC
enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };
namespace AscendC {

inline int64_t GetBlockIdx() { return npu_qat_host::ThisCore().index; }
inline int64_t GetBlockNum() { return npu_qat_host::ThisCore().count; }

template <pipe_t pipe> inline void PipeBarrier() {
    if (pipe == PIPE_V || pipe == PIPE_ALL) {
        npu_qat_host::ThisCore().reads.clear();
        npu_qat_host::ThisCore().writes.clear();
    }
}

// --- tensors and buffers -----------------------------------------------------------------------

template <typename T> class LocalTensor {
public:
    LocalTensor() = default;
    LocalTensor(uint8_t *address, uint32_t bytes) : address_(address), bytes_(bytes) {}
    LocalTensor operator[](uint32_t offset) const {
        NPU_QAT_CHECK(offset * sizeof(T) <= bytes_);
        return LocalTensor(address_ + offset * sizeof(T), bytes_ - offset * sizeof(T));
    }
    template <typename U> LocalTensor<U> ReinterpretCast() const {
        return LocalTensor<U>(address_, bytes_);
    }
    uint32_t GetSize() const { return bytes_ / sizeof(T); }
    T *Data() const { return reinterpret_cast<T *>(address_); }
    uint8_t *Address() const { return address_; }
    uint32_t Bytes() const { return bytes_; }

private:
    uint8_t *address_ = nullptr;
    uint32_t bytes_ = 0;
};

template <typename T> class GlobalTensor {
public:
    void SetGlobalBuffer(T *address, uint64_t size) {
        address_ = address;
        size_ = size;
    }
    GlobalTensor operator[](uint64_t offset) const {
        NPU_QAT_CHECK(offset <= size_);
        GlobalTensor part;
        part.SetGlobalBuffer(address_ + offset, size_ - offset);
        return part;
    }
    T *Data() const { return address_; }
    uint64_t GetSize() const { return size_; }

private:
    T *address_ = nullptr;
    uint64_t size_ = 0;
};

struct Piece {  // one buffer of a queue
    uint8_t *address;
    uint32_t bytes;
    enum { FREE, ALLOCATED, QUEUED, TAKEN } state;
};

template <TPosition position, int32_t depth> class TQue {
public:
    template <typename T> LocalTensor<T> AllocTensor() {
        for (Piece &piece : pieces_) {
            if (piece.state != Piece::FREE) continue;
            piece.state = Piece::ALLOCATED;
            std::memset(piece.address, 0xFF, piece.bytes);
            return LocalTensor<T>(piece.address, piece.bytes);
        }
        NPU_QAT_CHECK(!"AllocTensor: all buffers of the queue are in use");
        return {};
    }
    template <typename T> bool EnQue(const LocalTensor<T> &tensor) {
        Piece &piece = Find(tensor.Address());
        NPU_QAT_CHECK(piece.state == Piece::ALLOCATED);
        NPU_QAT_CHECK(static_cast<int32_t>(order_.size()) < depth);
        piece.state = Piece::QUEUED;
        order_.push_back(&piece);
        Synchronize();
        return true;
    }
    template <typename T> LocalTensor<T> DeQue() {
        NPU_QAT_CHECK(!order_.empty());
        Piece &piece = *order_.front();
        order_.pop_front();
        piece.state = Piece::TAKEN;
        Synchronize();
        return LocalTensor<T>(piece.address, piece.bytes);
    }
    template <typename T> void FreeTensor(LocalTensor<T> &tensor) {
        Piece &piece = Find(tensor.Address());
        NPU_QAT_CHECK(piece.state == Piece::TAKEN || piece.state == Piece::ALLOCATED);
        piece.state = Piece::FREE;
        std::memset(piece.address, 0xFF, piece.bytes);
    }
    void Add(uint8_t *address, uint32_t bytes) { pieces_.push_back({address, bytes, Piece::FREE}); }

private:
    // A queue's hand-over waits for the pipe on the other side, so it orders what touches its
    // buffers; instructions on other buffers are not ordered by it.
    void Synchronize() {
        auto touches = [this](const npu_qat_host::Range &range) {
            for (const Piece &piece : pieces_) {
                if (range.Overlaps({piece.address, piece.address + piece.bytes})) return true;
            }
            return false;
        };
        for (auto *ranges : {&npu_qat_host::ThisCore().reads, &npu_qat_host::ThisCore().writes}) {
            ranges->erase(std::remove_if(ranges->begin(), ranges->end(), touches), ranges->end());
        }
    }
    Piece &Find(const uint8_t *address) {
        for (Piece &piece : pieces_) {
            if (piece.address == address) return piece;
        }
        NPU_QAT_CHECK(!"a tensor that is not of this queue");
        std::abort();
    }
    std::deque<Piece> pieces_;
    std::deque<Piece *> order_;
};

template <TPosition position = TPosition::LCM> class TBuf {
public:
    template <typename T> LocalTensor<T> Get() { return LocalTensor<T>(address_, bytes_); }
    template <typename T> LocalTensor<T> Get(uint32_t length) {
        NPU_QAT_CHECK(length * sizeof(T) <= bytes_);
        return LocalTensor<T>(address_, length * sizeof(T));
    }
    void Set(uint8_t *address, uint32_t bytes) {
        address_ = address;
        bytes_ = bytes;
    }

private:
    uint8_t *address_ = nullptr;
    uint32_t bytes_ = 0;
};

class TPipe {
public:
    template <TPosition position, int32_t depth>
    bool InitBuffer(TQue<position, depth> &queue, uint8_t number, uint32_t bytes) {
        for (uint8_t i = 0; i < number; ++i) queue.Add(Carve(bytes), Rounded(bytes));
        return true;
    }
    template <TPosition position> bool InitBuffer(TBuf<position> &buffer, uint32_t bytes) {
        buffer.Set(Carve(bytes), Rounded(bytes));
        return true;
    }

private:
    static uint32_t Rounded(uint32_t bytes) { return (bytes + 31) / 32 * 32; }
    static uint8_t *Carve(uint32_t bytes) {
        npu_qat_host::Core &core = npu_qat_host::ThisCore();
        NPU_QAT_CHECK(core.used + Rounded(bytes) <= npu_qat_host::kUnifiedBuffer);
        uint8_t *address = core.unifiedBuffer + core.used;
        core.used += Rounded(bytes);
        return address;
    }
};

// --- copies --------------------------------------------------------------------------------------

struct DataCopyExtParams {
    uint16_t blockCount = 1;
    uint32_t blockLen = 0;  // bytes
    uint32_t srcStride = 0;
    uint32_t dstStride = 0;
    uint32_t rsv = 0;
    DataCopyExtParams(uint16_t count, uint32_t length, uint32_t src, uint32_t dst, uint32_t reserved)
        : blockCount(count), blockLen(length), srcStride(src), dstStride(dst), rsv(reserved) {}
};
template <typename T> struct DataCopyPadExtParams {
    bool isPad = false;
    uint8_t leftPadding = 0;
    uint8_t rightPadding = 0;  // values
    T paddingValue{};
    DataCopyPadExtParams(bool pad, uint8_t left, uint8_t right, T value)
        : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
};

template <typename T> void CheckLocal(const LocalTensor<T> &tensor, uint64_t bytes) {
    const uint8_t *begin = tensor.Address();
    NPU_QAT_CHECK((begin - npu_qat_host::ThisCore().unifiedBuffer) % 32 == 0);
    NPU_QAT_CHECK(bytes <= tensor.Bytes());
    NPU_QAT_CHECK(npu_qat_host::ThisCore().Owns(begin, begin + bytes));
}

template <typename T>
void DataCopyPad(const LocalTensor<T> &dst, const GlobalTensor<T> &src,
                 const DataCopyExtParams &params, const DataCopyPadExtParams<T> &pad) {
    NPU_QAT_CHECK(params.blockCount == 1 && pad.leftPadding == 0);  // all that the model covers
    NPU_QAT_CHECK(params.blockLen > 0 && params.blockLen < (1u << 21));
    NPU_QAT_CHECK(params.blockLen % sizeof(T) == 0 && params.blockLen / sizeof(T) <= src.GetSize());
    NPU_QAT_CHECK(pad.rightPadding * sizeof(T) < 32);
    const uint32_t filled = params.blockLen + (pad.isPad ? pad.rightPadding * sizeof(T) : 0);
    CheckLocal(dst, (filled + 31) / 32 * 32);
    npu_qat_host::ThisCore().copied += params.blockLen;
    std::memcpy(dst.Address(), src.Data(), params.blockLen);
    T *end = reinterpret_cast<T *>(dst.Address() + params.blockLen);
    if (pad.isPad) std::fill(end, end + pad.rightPadding, pad.paddingValue);
}

template <typename T>
void DataCopyPad(const GlobalTensor<T> &dst, const LocalTensor<T> &src,
                 const DataCopyExtParams &params) {
    NPU_QAT_CHECK(params.blockCount == 1 && params.blockLen > 0 && params.blockLen < (1u << 21));
    NPU_QAT_CHECK(params.blockLen % sizeof(T) == 0 && params.blockLen / sizeof(T) <= dst.GetSize());
    CheckLocal(src, params.blockLen);
    npu_qat_host::ThisCore().copied += params.blockLen;
    std::memcpy(dst.Data(), src.Address(), params.blockLen);
}

// --- vector instructions ---------------------------------------------------------------------

// Which bytes an instruction reads and writes: checked, and remembered until the next barrier.
class Instruction {
public:
    template <typename T> void Reads(const LocalTensor<T> &tensor, uint64_t bytes) {
        reads_.push_back(Range(tensor, bytes));
    }
    template <typename T> void Writes(const LocalTensor<T> &tensor, uint64_t bytes) {
        writes_.push_back(Range(tensor, bytes));
    }
    // For instructions whose operands may not share memory with their result, even in place.
    void CheckApart() const {
        for (const auto &read : reads_) {
            for (const auto &written : writes_) NPU_QAT_CHECK(!read.Overlaps(written));
        }
    }
    // `repeats`: how often the instruction goes through 256 bytes, its widest type counted.
    void Issue(uint64_t repeats) {
        npu_qat_host::Core &core = npu_qat_host::ThisCore();
        core.repeats += repeats;
        for (const auto &mine : reads_) {
            for (const auto &earlier : core.writes) NPU_QAT_CHECK(!mine.Overlaps(earlier));
        }
        for (const auto &mine : writes_) {
            for (const auto &earlier : core.writes) NPU_QAT_CHECK(!mine.Overlaps(earlier));
            for (const auto &earlier : core.reads) NPU_QAT_CHECK(!mine.Overlaps(earlier));
        }
        core.reads.insert(core.reads.end(), reads_.begin(), reads_.end());
        core.writes.insert(core.writes.end(), writes_.begin(), writes_.end());
    }

private:
    template <typename T>
    static npu_qat_host::Range Range(const LocalTensor<T> &tensor, uint64_t bytes) {
        CheckLocal(tensor, bytes);
        return {tensor.Address(), tensor.Address() + bytes};
    }
    std::vector<npu_qat_host::Range> reads_, writes_;
};

inline uint64_t Repeats(uint64_t bytes) { return (bytes + 255) / 256; }

template <typename T, typename... Allowed> constexpr bool kOneOf = (std::is_same_v<T, Allowed> || ...);

// In place is allowed, for types of one size; partly overlapping is not.
template <typename D, typename S>
void CheckInPlace(const LocalTensor<D> &dst, const LocalTensor<S> &src, int64_t count) {
    NPU_QAT_CHECK(dst.Address() == src.Address() || dst.Address() + count * sizeof(D) <= src.Address() ||
                  src.Address() + count * sizeof(S) <= dst.Address());
    NPU_QAT_CHECK(dst.Address() != src.Address() || sizeof(D) == sizeof(S));
}

template <typename D, typename S, typename F>
void Unary(const LocalTensor<D> &dst, const LocalTensor<S> &src, int64_t count, F f) {
    NPU_QAT_CHECK(count > 0);
    Instruction instruction;
    instruction.Reads(src, count * sizeof(S));
    instruction.Writes(dst, count * sizeof(D));
    CheckInPlace(dst, src, count);
    instruction.Issue(Repeats(count * std::max(sizeof(D), sizeof(S))));
    for (int64_t i = 0; i < count; ++i) dst.Data()[i] = f(src.Data()[i]);
}

template <typename T, typename F>
void Binary(const LocalTensor<T> &dst, const LocalTensor<T> &a, const LocalTensor<T> &b,
            int64_t count, F f) {
    NPU_QAT_CHECK(count > 0);
    Instruction instruction;
    instruction.Reads(a, count * sizeof(T));
    instruction.Reads(b, count * sizeof(T));
    instruction.Writes(dst, count * sizeof(T));
    instruction.Issue(Repeats(count * sizeof(T)));
    CheckInPlace(dst, a, count);
    CheckInPlace(dst, b, count);
    for (int64_t i = 0; i < count; ++i) dst.Data()[i] = f(a.Data()[i], b.Data()[i]);
}

struct BinaryRepeatParams {
    uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1;
    uint8_t dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
    BinaryRepeatParams() = default;
    BinaryRepeatParams(uint8_t db, uint8_t s0b, uint8_t s1b, uint8_t dr, uint8_t s0r, uint8_t s1r)
        : dstBlkStride(db), src0BlkStride(s0b), src1BlkStride(s1b), dstRepStride(dr),
          src0RepStride(s0r), src1RepStride(s1r) {}
};

// Where value `i` of repeat `repeat` lies: 8 blocks of 32 bytes a repeat, with strides in blocks.
template <typename T> uint64_t Place(uint64_t repeat, uint64_t i, uint64_t block, uint64_t stride) {
    constexpr uint64_t perBlock = 32 / sizeof(T);
    return (repeat * stride + i / perBlock * block) * perBlock + i % perBlock;
}

template <typename T, typename F>
void Binary(const LocalTensor<T> &dst, const LocalTensor<T> &a, const LocalTensor<T> &b,
            uint64_t mask, uint8_t repeats, const BinaryRepeatParams &p, F f) {
    NPU_QAT_CHECK(mask > 0 && mask * sizeof(T) <= 256 && repeats > 0);
    // An operand lies where the result does, with the same strides, or clear of it.
    NPU_QAT_CHECK(a.Address() != dst.Address() ||
                  (p.src0BlkStride == p.dstBlkStride && p.src0RepStride == p.dstRepStride));
    NPU_QAT_CHECK(b.Address() != dst.Address() ||
                  (p.src1BlkStride == p.dstBlkStride && p.src1RepStride == p.dstRepStride));
    const uint64_t lastR = repeats - 1, lastI = mask - 1;
    Instruction instruction;
    instruction.Reads(a, (Place<T>(lastR, lastI, p.src0BlkStride, p.src0RepStride) + 1) * sizeof(T));
    instruction.Reads(b, (Place<T>(lastR, lastI, p.src1BlkStride, p.src1RepStride) + 1) * sizeof(T));
    instruction.Writes(dst, (Place<T>(lastR, lastI, p.dstBlkStride, p.dstRepStride) + 1) * sizeof(T));
    instruction.Issue(repeats);
    for (uint64_t r = 0; r < repeats; ++r) {
        for (uint64_t i = 0; i < mask; ++i) {
            dst.Data()[Place<T>(r, i, p.dstBlkStride, p.dstRepStride)] =
                f(a.Data()[Place<T>(r, i, p.src0BlkStride, p.src0RepStride)],
                  b.Data()[Place<T>(r, i, p.src1BlkStride, p.src1RepStride)]);
        }
    }
}

#define NPU_QAT_BINARY(name, expression, ...)                                                   \
    template <typename T>                                                                       \
    void name(const LocalTensor<T> &dst, const LocalTensor<T> &a, const LocalTensor<T> &b,      \
              const int32_t &count) {                                                           \
        static_assert(kOneOf<T, __VA_ARGS__>, #name ": no such type on dav-2201");              \
        Binary(dst, a, b, count, [](T x, T y) { return static_cast<T>(expression); });          \
    }                                                                                           \
    template <typename T>                                                                       \
    void name(const LocalTensor<T> &dst, const LocalTensor<T> &a, const LocalTensor<T> &b,      \
              uint64_t mask, const uint8_t repeats, const BinaryRepeatParams &params) {         \
        static_assert(kOneOf<T, __VA_ARGS__>, #name ": no such type on dav-2201");              \
        Binary(dst, a, b, mask, repeats, params,                                                \
               [](T x, T y) { return static_cast<T>(expression); });                            \
    }

// half arithmetic is not modelled: the kernels compute in float.
NPU_QAT_BINARY(Add, x + y, float, int16_t, int32_t)
NPU_QAT_BINARY(Sub, x - y, float, int16_t, int32_t)
NPU_QAT_BINARY(Mul, x *y, float, int16_t, int32_t)
NPU_QAT_BINARY(Div, x / y, float)
NPU_QAT_BINARY(Max, x > y ? x : y, float, int16_t, int32_t)
NPU_QAT_BINARY(Min, x < y ? x : y, float, int16_t, int32_t)
NPU_QAT_BINARY(And, x &y, int16_t, uint16_t)
NPU_QAT_BINARY(Or, x | y, int16_t, uint16_t)
#undef NPU_QAT_BINARY

#define NPU_QAT_SCALAR(name, expression, ...)                                                   \
    template <typename T>                                                                       \
    void name(const LocalTensor<T> &dst, const LocalTensor<T> &src, const T &scalar,            \
              const int32_t &count) {                                                           \
        static_assert(kOneOf<T, __VA_ARGS__>, #name ": no such type on dav-2201");              \
        Unary(dst, src, count, [scalar](T x) {                                                  \
            const T y = scalar;                                                                 \
            return static_cast<T>(expression);                                                  \
        });                                                                                     \
    }

template <typename T> T ShiftBy(T bits) {
    NPU_QAT_CHECK(bits >= 0 && bits < static_cast<T>(8 * sizeof(T)));
    return bits;
}

NPU_QAT_SCALAR(Adds, x + y, float, int16_t, int32_t)
NPU_QAT_SCALAR(Muls, x *y, float, int16_t, int32_t)
NPU_QAT_SCALAR(Maxs, x > y ? x : y, float, int16_t, int32_t)
NPU_QAT_SCALAR(Mins, x < y ? x : y, float, int16_t, int32_t)
// Shifts of signed types are arithmetic to the right.
NPU_QAT_SCALAR(ShiftLeft, static_cast<std::make_unsigned_t<T>>(x) << ShiftBy(y), int16_t, uint16_t, int32_t, uint32_t)
NPU_QAT_SCALAR(ShiftRight, x >> ShiftBy(y), int16_t, uint16_t, int32_t, uint32_t)
#undef NPU_QAT_SCALAR

template <typename T>
void Abs(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t &count) {
    static_assert(kOneOf<T, float>, "Abs: no such type on dav-2201");
    Unary(dst, src, count, [](T x) { return std::fabs(x); });
}
template <typename T>
void Sqrt(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t &count) {
    static_assert(kOneOf<T, float>, "Sqrt: no such type on dav-2201");
    Unary(dst, src, count, [](T x) { return std::sqrt(x); });
}

template <typename T>
void Duplicate(const LocalTensor<T> &dst, const T &scalar, const int32_t &count) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate: no such type on dav-2201");
    NPU_QAT_CHECK(count > 0);
    Instruction instruction;
    instruction.Writes(dst, count * sizeof(T));
    instruction.Issue(Repeats(count * sizeof(T)));
    std::fill(dst.Data(), dst.Data() + count, scalar);
}

inline float RoundAs(float x, RoundMode mode) {
    switch (mode) {
        case RoundMode::CAST_RINT: return std::nearbyint(x);
        case RoundMode::CAST_FLOOR: return std::floor(x);
        case RoundMode::CAST_CEIL: return std::ceil(x);
        case RoundMode::CAST_ROUND: return std::round(x);
        case RoundMode::CAST_TRUNC: return std::trunc(x);
        default: NPU_QAT_CHECK(!"this cast needs a rounding mode"); return x;
    }
}

template <typename To> To Saturated(float x) {
    if (std::isnan(x)) return 0;
    const double low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
    return static_cast<To>(std::min(std::max(static_cast<double>(x), low), high));
}

template <typename D, typename S>
void Cast(const LocalTensor<D> &dst, const LocalTensor<S> &src, const RoundMode &mode,
          const uint32_t count) {
    using npu_qat_host::BitCast;
    constexpr bool widens = kOneOf<D, float> && kOneOf<S, bfloat16_t, half>;
    constexpr bool halfFromInt = kOneOf<D, half> && kOneOf<S, int16_t>;
    constexpr bool fromFloat = kOneOf<S, float> && kOneOf<D, bfloat16_t, half, int16_t, int32_t>;
    constexpr bool fromHalf = kOneOf<S, half> && kOneOf<D, int16_t, int32_t>;
    constexpr bool floatFromInt = kOneOf<D, float> && kOneOf<S, int32_t, int16_t>;
    static_assert(widens || halfFromInt || fromFloat || fromHalf || floatFromInt,
                  "Cast: no such pair of types on dav-2201, or not modelled");
    const bool none = mode == RoundMode::CAST_NONE;
    if constexpr (widens) {
        NPU_QAT_CHECK(none);
        Unary(dst, src, count, [](S x) {
            if constexpr (kOneOf<S, half>) return npu_qat_host::HalfToFloat(x.bits);
            else return BitCast<float>(static_cast<uint32_t>(x.bits) << 16);
        });
    } else if constexpr (halfFromInt) {
        NPU_QAT_CHECK(none);
        Unary(dst, src, count, [](S x) { return half{npu_qat_host::FloatToHalf(x)}; });
    } else if constexpr (fromFloat && kOneOf<D, bfloat16_t, half>) {
        NPU_QAT_CHECK(mode == RoundMode::CAST_RINT);  // the only one that the model has
        Unary(dst, src, count, [](float x) {
            if constexpr (kOneOf<D, half>) return half{npu_qat_host::FloatToHalf(x)};
            else return bfloat16_t{npu_qat_host::FloatToBf16(x)};
        });
    } else if constexpr (fromFloat || fromHalf) {
        Unary(dst, src, count, [mode](S x) {
            if constexpr (fromHalf) return Saturated<D>(RoundAs(npu_qat_host::HalfToFloat(x.bits), mode));
            else return Saturated<D>(RoundAs(x, mode));
        });
    } else {
        NPU_QAT_CHECK(sizeof(S) == 2 ? none : mode == RoundMode::CAST_RINT || none);
        Unary(dst, src, count, [](S x) { return static_cast<float>(x); });
    }
}

// One value a repeat: the largest, or the sum, of its first `mask` values.
template <typename F>
void WholeReduce(const LocalTensor<float> &dst, const LocalTensor<float> &src, int32_t mask,
                 int32_t repeats, int32_t dstStride, int32_t srcBlock, int32_t srcStride, F f) {
    NPU_QAT_CHECK(mask > 0 && mask <= 64 && repeats > 0 && repeats <= 255);
    Instruction instruction;
    instruction.Reads(src, (Place<float>(repeats - 1, mask - 1, srcBlock, srcStride) + 1) * 4);
    instruction.Writes(dst, (static_cast<uint64_t>(repeats - 1) * dstStride + 1) * 4);
    instruction.CheckApart();
    instruction.Issue(repeats);
    for (int32_t r = 0; r < repeats; ++r) {
        float values[64];
        for (int32_t i = 0; i < mask; ++i) values[i] = src.Data()[Place<float>(r, i, srcBlock, srcStride)];
        // A binary tree, as in the chip's adders; the order of a maximum does not matter.
        int32_t n = mask;
        while (n > 1) {
            for (int32_t i = 0; i < n / 2; ++i) values[i] = f(values[2 * i], values[2 * i + 1]);
            if (n % 2) values[n / 2] = values[n - 1];
            n = (n + 1) / 2;
        }
        dst.Data()[r * dstStride] = values[0];
    }
}

template <typename T>
void WholeReduceMax(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t mask,
                    const int32_t repeats, const int32_t dstStride, const int32_t srcBlock,
                    const int32_t srcStride, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {
    static_assert(kOneOf<T, float>, "WholeReduceMax: no such type on dav-2201, or not modelled");
    NPU_QAT_CHECK(order == ReduceOrder::ORDER_ONLY_VALUE);
    WholeReduce(dst, src, mask, repeats, dstStride, srcBlock, srcStride, [](float x, float y) {
        NPU_QAT_CHECK(!std::isnan(x) && !std::isnan(y));  // the chip's rule for NaN is not known
        return x > y ? x : y;
    });
}
template <typename T>
void WholeReduceSum(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t mask,
                    const int32_t repeats, const int32_t dstStride, const int32_t srcBlock,
                    const int32_t srcStride) {
    static_assert(kOneOf<T, float>, "WholeReduceSum: no such type on dav-2201, or not modelled");
    WholeReduce(dst, src, mask, repeats, dstStride, srcBlock, srcStride,
                [](float x, float y) { return x + y; });
}

struct BrcbRepeatParams {
    uint16_t dstBlkStride = 1, dstRepStride = 8;
    BrcbRepeatParams(uint16_t block, uint16_t repeat) : dstBlkStride(block), dstRepStride(repeat) {}
};

// Eight values a repeat, each spread over a block of 32 bytes.
template <typename T>
void Brcb(const LocalTensor<T> &dst, const LocalTensor<T> &src, const uint8_t repeats,
          const BrcbRepeatParams &params) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Brcb: no such type on dav-2201");
    constexpr uint64_t perBlock = 32 / sizeof(T);
    NPU_QAT_CHECK(repeats > 0);
    const uint64_t last = (repeats - 1) * params.dstRepStride + 7 * params.dstBlkStride;
    Instruction instruction;
    instruction.Reads(src, repeats * 8 * sizeof(T));
    instruction.Writes(dst, (last + 1) * 32);
    NPU_QAT_CHECK(params.dstBlkStride > 0);
    instruction.CheckApart();
    instruction.Issue(repeats);
    for (uint64_t r = 0; r < repeats; ++r) {
        for (uint64_t v = 0; v < 8; ++v) {
            T *block = dst.Data() + (r * params.dstRepStride + v * params.dstBlkStride) * perBlock;
            std::fill(block, block + perBlock, src.Data()[r * 8 + v]);
        }
    }
}

}  // namespace AscendC
