// Products of rows with a weight that was packed once: float32, bfloat16, or int8 with a scale for
// each row and each output. Shapes: T rows, K inputs, N outputs.
#pragma once

#include "few_rows.h"
#include "vectors.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace moe_dist {

using at::Tensor;

enum class Precision : int64_t { kFloat, kBFloat16, kInt8 };

// Rows as a product reads them. Codes of int8 are unsigned: value = scale * (code - zero).
struct Rows {
  Tensor codes;         // (T, K)
  Tensor scale, zero;   // (T,) each, of int8 alone
};

constexpr int64_t kBlockN = 64, kBlockM = 64;

// Kernels are made for each number of rows, so there are few numbers; bfloat16 has tiles from 16 on.
inline int64_t rounded_rows(int64_t rows, bool by_16) {
  if (rows > 8 || (by_16 && rows > 2)) return (rows + 15) / 16 * 16;
  return rows > 4 ? 8 : rows > 2 ? 4 : rows;
}

inline at::ScalarType code_type(Precision precision) {
  if (precision == Precision::kInt8) return at::kByte;
  return precision == Precision::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

// A matrix with room for `rounded_rows`; what is beyond T is zero, so that it costs no time.
inline Tensor matrix(int64_t T, int64_t N, at::ScalarType type) {
  const int64_t room = rounded_rows(T, true);
  Tensor out = at::empty({room, N}, at::TensorOptions().dtype(type));
  if (room > T) out.narrow(0, T, room - T).zero_();
  return out.narrow(0, 0, T);
}

inline void encode_row(const float* x, int64_t K, uint8_t* codes, float* scale, float* zero) {
  Vec low(0.f), high(0.f);
  int64_t k = 0;
  for (; k + Vec::size() <= K; k += Vec::size()) {
    const Vec v = Vec::loadu(x + k);
    low = at::vec::minimum(low, v);
    high = at::vec::maximum(high, v);
  }
  float smallest = reduce_min(low), largest = reduce_max(high);
  for (; k < K; ++k) {
    smallest = std::min(smallest, x[k]);
    largest = std::max(largest, x[k]);
  }
  const float step = std::max((largest - smallest) / 255.f, 1e-20f);
  *scale = step;
  *zero = std::nearbyint(-smallest / step);
  to_codes(x, K, 1.f / step, *zero, codes);
}

// One row of float32 as codes of a precision; scale and zero are of int8 alone.
inline void encode_row(const float* x, int64_t K, Precision precision, void* codes, float* scale, float* zero) {
  if (precision == Precision::kFloat)
    std::memcpy(codes, x, K * sizeof(float));
  else if (precision == Precision::kBFloat16)
    at::vec::convert(x, static_cast<at::BFloat16*>(codes), K);
  else
    encode_row(x, K, static_cast<uint8_t*>(codes), scale, zero);
}

// What a product of this precision reads, made of float32 rows (T, K).
inline Rows encode(const Tensor& x, Precision precision) {
  const int64_t T = x.size(0), K = x.size(1);
  if (precision == Precision::kFloat) return {x, {}, {}};
  Rows rows{matrix(T, K, code_type(precision)), {}, {}};
  const float* from = x.const_data_ptr<float>();
  if (precision == Precision::kBFloat16) {
    at::BFloat16* to = rows.codes.data_ptr<at::BFloat16>();
    at::parallel_for(0, T, 32, [&](int64_t first, int64_t last) {
      at::vec::convert(from + first * K, to + first * K, (last - first) * K);
    });
    return rows;
  }
  rows.scale = at::empty({T}, x.options());
  rows.zero = at::empty({T}, x.options());
  uint8_t* to = rows.codes.data_ptr<uint8_t>();
  float *scale = rows.scale.data_ptr<float>(), *zero = rows.zero.data_ptr<float>();
  at::parallel_for(0, T, 16, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      encode_row(from + t * K, K, to + t * K, scale + t, zero + t);
  });
  return rows;
}

// The rows that `order` names, one after the other; with room for a part that begins anywhere.
inline Rows gather(const Rows& rows, const std::vector<int64_t>& order) {
  const int64_t S = order.size(), K = rows.codes.size(1);
  const size_t bytes = K * rows.codes.element_size();
  Rows out{matrix(S + 15, K, rows.codes.scalar_type()).narrow(0, 0, S), {}, {}};
  const char* from = static_cast<const char*>(rows.codes.const_data_ptr());
  char* to = static_cast<char*>(out.codes.data_ptr());
  for (int64_t s = 0; s < S; ++s) std::memcpy(to + s * bytes, from + order[s] * bytes, bytes);
  if (!rows.scale.defined()) return out;
  for (auto [whole, part] : {std::pair{&rows.scale, &out.scale}, {&rows.zero, &out.zero}}) {
    *part = at::empty({S}, whole->options());
    const float* values = whole->const_data_ptr<float>();
    float* own = part->data_ptr<float>();
    for (int64_t s = 0; s < S; ++s) own[s] = values[order[s]];
  }
  return out;
}

inline Rows slice(const Rows& rows, int64_t first, int64_t count) {
  if (first == 0 && count == rows.codes.size(0)) return rows;
  Rows out{rows.codes.narrow(0, first, count), {}, {}};
  if (rows.scale.defined()) {
    out.scale = rows.scale.narrow(0, first, count);
    out.zero = rows.zero.narrow(0, first, count);
  }
  return out;
}

// Rows as a block of a product reads them, with room for `rounded_rows`.
struct RowCodes {
  const void* codes;    // (T, K)
  const float *scale, *zero;  // (T,) each, of int8 alone
};

inline RowCodes row_codes(const Rows& rows, int64_t first = 0) {
  const char* codes = static_cast<const char*>(rows.codes.const_data_ptr());
  RowCodes out{codes + first * rows.codes.size(1) * rows.codes.element_size(), nullptr, nullptr};
  if (!rows.scale.defined()) return out;
  out.scale = rows.scale.const_data_ptr<float>() + first;
  out.zero = rows.zero.const_data_ptr<float>() + first;
  return out;
}

struct Linear {
  Precision precision = Precision::kFloat;
  int64_t K = 0, N = 0, blocks = 0;
  bool is_gated = false;  // each block of outputs has one of gates before it, and is multiplied by them
  Tensor packed;       // (blocks, K / v, kBlockN, v), where v inputs lie together
  Tensor bias;         // (blocks * kBlockN,) float32
  Tensor scale, sums;  // (blocks * kBlockN,) of int8: a weight's step, and the sum of its codes

  Linear() = default;

  // Pack a weight (N, K) and its bias (N), both float32; of a gated one those of the gates too.
  Linear(const Tensor& weight, const std::optional<Tensor>& bias_N, Precision precision,
         const std::optional<Tensor>& gate = std::nullopt,
         const std::optional<Tensor>& gate_bias_N = std::nullopt)
      : precision(precision), K(weight.size(1)), N(weight.size(0)), is_gated(gate.has_value()) {
    blocks = (N + kBlockN - 1) / kBlockN;
    const int64_t together = precision == Precision::kInt8 ? 4 : precision == Precision::kFloat ? 1 : 2;
    TORCH_CHECK(K % together == 0, "a width of ", K, " is no multiple of ", together);
    Tensor padded = filled_up(weight, {N, K});
    bias = filled_up(bias_N, {N});
    if (is_gated) {
      TORCH_CHECK(gate->sizes() == weight.sizes(), "gates of ", gate->sizes(), " for ", weight.sizes());
      padded = alternating(filled_up(gate, {N, K}), padded);
      bias = alternating(filled_up(gate_bias_N, {N}), bias);
    }
    const int64_t all = is_gated ? 2 * blocks : blocks;
    if (precision == Precision::kInt8) {
      scale = padded.abs().amax(1).div(127.).clamp_min(1e-20);
      padded = padded.div(scale.unsqueeze(1)).round();
      sums = padded.sum(1);
    }
    const auto type = precision == Precision::kInt8 ? at::kChar : code_type(precision);
    packed = padded.to(type)
                 .view({all, kBlockN, K / together, together})
                 .permute({0, 2, 1, 3})
                 .contiguous();
    weights_ = packed.const_data_ptr();
    biases_ = bias.const_data_ptr<float>();
    if (precision != Precision::kInt8) return;
    steps_ = scale.const_data_ptr<float>();
    code_sums_ = sums.const_data_ptr<float>();
  }

  // out[t, n] = activation(x W + bias), as float32 or bfloat16, with `stride` between rows. A gated
  // one activates the gates and multiplies with them.
  template <typename Out>
  void apply(const Rows& rows, Out* out, int64_t stride, int64_t activation = -1) const {
    const Tensor& codes = rows.codes;
    TORCH_CHECK(codes.size(1) == K && codes.is_contiguous(), "rows of ", codes.sizes(), " for ", K);
    const int64_t read = codes.storage_offset() + rounded_rows(codes.size(0), precision == Precision::kBFloat16) * K;
    TORCH_CHECK(static_cast<int64_t>(codes.storage().nbytes()) >= read * codes.element_size(),
                "rows without room to be rounded up");
    const int64_t T = codes.size(0), row_blocks = (T + kBlockM - 1) / kBlockM;
    at::parallel_for(0, blocks * row_blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i / blocks * kBlockM;
        apply_block(i % blocks, row_codes(rows, row), std::min(kBlockM, T - row), out + row * stride,
                    stride, activation);
      }
      release();
    });
  }

  // The same of one block of outputs and at most `kBlockM` rows; the first output of all lies at
  // `out`. A thread calls `release` after its blocks.
  template <typename Out>
  void apply_block(int64_t block, const RowCodes& rows, int64_t T, Out* out, int64_t stride,
                   int64_t activation = -1) const {
    if (precision == Precision::kFloat)
      run<float, float, float>(block, rows, T, out, stride, activation);
    else if (precision == Precision::kBFloat16)
      run<at::BFloat16, at::BFloat16, float>(block, rows, T, out, stride, activation);
    else
      run<uint8_t, int8_t, int32_t>(block, rows, T, out, stride, activation);
  }

  void release() const { at::native::cpublas::brgemm_release(precision != Precision::kFloat); }

 private:
  Tensor filled_up(const std::optional<Tensor>& values, std::vector<int64_t> sizes) const {
    sizes[0] = blocks * kBlockN;
    Tensor out = at::zeros(sizes, at::kFloat);
    if (values) out.narrow(0, 0, N).copy_(*values);
    return out;
  }

  Tensor alternating(const Tensor& first, const Tensor& second) const {
    std::vector<int64_t> sizes = first.sizes().vec();
    sizes[0] *= 2;
    return at::stack({first.view({blocks, -1}), second.view({blocks, -1})}, 1).view(sizes);
  }

  template <typename A, typename B, typename C>
  void multiply(int64_t block, const void* a, int64_t T, C* c) const {
    constexpr int64_t together = 4 / sizeof(A);
    const A* rows = static_cast<const A*>(a);
    const B* weights = static_cast<const B*>(weights_) + block * kBlockN * K;
    if (multiply_few(T, rows, weights, K / together, c)) return;
    at::native::cpublas::brgemm(rounded_rows(T, std::is_same_v<A, at::BFloat16>), kBlockN, K, K, kBlockN, kBlockN, false, rows,
                                weights, c, !std::is_same_v<A, float>);
  }

  template <typename A, typename B, typename C, typename Out>
  void run(int64_t block, const RowCodes& rows, int64_t T, Out* out, int64_t stride,
           int64_t activation) const {
    alignas(64) C found[kBlockM * kBlockN], gates[kBlockM * kBlockN];
    alignas(64) Out last_columns[kBlockM * kBlockN];
    const int64_t own = is_gated ? 2 * block + 1 : block;
    multiply<A, B>(own, rows.codes, T, found);
    if (is_gated) multiply<A, B>(own - 1, rows.codes, T, gates);
    const int64_t n = block * kBlockN, width = std::min(kBlockN, N - n);
    Out* to = width == kBlockN ? out + n : last_columns;
    const int64_t step = width == kBlockN ? stride : kBlockN;
    for (int64_t j = 0; j < kBlockN; j += 2 * Vec::size()) {
      const Columns<C> first(*this, own, j), second(*this, own, j + Vec::size());
      if (is_gated) {
        const Columns<C> gate_1(*this, own - 1, j), gate_2(*this, own - 1, j + Vec::size());
        for (int64_t r = 0; r < T; ++r)
          store_pair(activated(gate_1(gates, rows, r), activation) * first(found, rows, r),
                     activated(gate_2(gates, rows, r), activation) * second(found, rows, r),
                     to + r * step + j);
      } else {
        for (int64_t r = 0; r < T; ++r)
          store_pair(activated(first(found, rows, r), activation),
                     activated(second(found, rows, r), activation), to + r * step + j);
      }
    }
    for (int64_t r = 0; r < T && to == last_columns; ++r)
      std::memcpy(out + r * stride + n, last_columns + r * kBlockN, width * sizeof(Out));
  }

  // What makes outputs of sums: of one vector of columns, for all rows.
  template <typename C>
  struct Columns {
    Vec bias, steps, code_sums;
    int64_t column;

    Columns(const Linear& linear, int64_t block, int64_t j) : column(j) {
      const int64_t n = block * kBlockN + j;
      bias = Vec::loadu(linear.biases_ + n);
      if constexpr (std::is_same_v<C, int32_t>) {
        steps = Vec::loadu(linear.steps_ + n);
        code_sums = Vec::loadu(linear.code_sums_ + n);
      }
    }

    Vec operator()(const C* sums, const RowCodes& rows, int64_t r) const {
      Vec v = load_float(sums + r * kBlockN + column);
      if constexpr (std::is_same_v<C, int32_t>)
        v = (v - Vec(rows.zero[r]) * code_sums) * (Vec(rows.scale[r]) * steps);
      return v + bias;
    }
  };

  // Of the tensors above.
  const void* weights_ = nullptr;
  const float *biases_ = nullptr, *steps_ = nullptr, *code_sums_ = nullptr;
};

}  // namespace moe_dist
