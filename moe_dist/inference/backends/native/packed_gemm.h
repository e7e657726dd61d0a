// Products of rows with a weight that was packed once: float32, bfloat16, or int8 with a scale for
// each row and each output. Shapes: T rows, K inputs, N outputs.
#pragma once

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

// Kernels are made for each number of rows, so there are few numbers; buffers have room for them.
inline int64_t rounded_rows(int64_t rows) {
  if (rows > 8) return (rows + 15) / 16 * 16;
  return rows > 4 ? 8 : rows > 2 ? 4 : rows;
}

inline at::ScalarType code_type(Precision precision) {
  if (precision == Precision::kInt8) return at::kByte;
  return precision == Precision::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

// A matrix with room for `rounded_rows`; what is beyond T is zero, so that it costs no time.
inline Tensor matrix(int64_t T, int64_t N, at::ScalarType type) {
  const int64_t room = rounded_rows(T);
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

struct Linear {
  Precision precision = Precision::kFloat;
  int64_t K = 0, N = 0, blocks = 0;
  Tensor packed;       // (blocks, K / v, kBlockN, v), where v inputs lie together
  Tensor bias;         // (blocks * kBlockN,) float32
  Tensor scale, sums;  // (blocks * kBlockN,) of int8: a weight's step, and the sum of its codes

  Linear() = default;

  // Pack a weight (N, K) and its bias (N), both float32.
  Linear(const Tensor& weight, const std::optional<Tensor>& bias_N, Precision precision)
      : precision(precision), K(weight.size(1)), N(weight.size(0)) {
    blocks = (N + kBlockN - 1) / kBlockN;
    const int64_t together = precision == Precision::kInt8 ? 4 : precision == Precision::kFloat ? 1 : 2;
    TORCH_CHECK(K % together == 0, "a width of ", K, " is no multiple of ", together);
    Tensor padded = at::zeros({blocks * kBlockN, K}, at::kFloat);
    padded.narrow(0, 0, N).copy_(weight);
    bias = at::zeros({blocks * kBlockN}, at::kFloat);
    if (bias_N) bias.narrow(0, 0, N).copy_(*bias_N);
    if (precision == Precision::kInt8) {
      scale = padded.abs().amax(1).div(127.).clamp_min(1e-20);
      padded = padded.div(scale.unsqueeze(1)).round();
      sums = padded.sum(1);
    }
    const auto type = precision == Precision::kInt8 ? at::kChar : code_type(precision);
    packed = padded.to(type)
                 .view({blocks, kBlockN, K / together, together})
                 .permute({0, 2, 1, 3})
                 .contiguous();
  }

  // out[t, n] = activation(x W + bias), as float32 or bfloat16, with `stride` between rows.
  template <typename Out>
  void apply(const Rows& rows, Out* out, int64_t stride, int64_t activation = -1) const {
    const Tensor& codes = rows.codes;
    TORCH_CHECK(codes.size(1) == K && codes.is_contiguous(), "rows of ", codes.sizes(), " for ", K);
    const int64_t read = codes.storage_offset() + rounded_rows(codes.size(0)) * K;
    TORCH_CHECK(static_cast<int64_t>(codes.storage().nbytes()) >= read * codes.element_size(),
                "rows without room to be rounded up");
    with_activation(activation, [&](auto activate) {
      if (precision == Precision::kFloat)
        run<float, float, float>(rows, out, stride, activate);
      else if (precision == Precision::kBFloat16)
        run<at::BFloat16, at::BFloat16, float>(rows, out, stride, activate);
      else
        run<uint8_t, int8_t, int32_t>(rows, out, stride, activate);
    });
  }

 private:
  template <typename A, typename B, typename C, typename Out, typename Activation>
  void run(const Rows& rows, Out* out, int64_t stride, Activation activate) const {
    constexpr bool is_packed = !std::is_same_v<A, float>, is_int8 = std::is_same_v<C, int32_t>;
    const int64_t T = rows.codes.size(0), row_blocks = (T + kBlockM - 1) / kBlockM;
    const A* a = static_cast<const A*>(rows.codes.const_data_ptr());
    const B* b = static_cast<const B*>(packed.const_data_ptr());
    const float* biases = bias.const_data_ptr<float>();
    const float* steps = is_int8 ? scale.const_data_ptr<float>() : nullptr;
    const float* code_sums = is_int8 ? sums.const_data_ptr<float>() : nullptr;
    const float* row_steps = is_int8 ? rows.scale.const_data_ptr<float>() : nullptr;
    const float* row_zeros = is_int8 ? rows.zero.const_data_ptr<float>() : nullptr;
    at::parallel_for(0, blocks * row_blocks, 1, [&](int64_t first, int64_t last) {
      alignas(64) C block[kBlockM * kBlockN];
      alignas(64) Out last_columns[kBlockN];
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = i % blocks * kBlockN, row = i / blocks * kBlockM;
        const int64_t m = std::min(kBlockM, T - row), width = std::min(kBlockN, N - n);
        at::native::cpublas::brgemm(rounded_rows(m), kBlockN, K, K, kBlockN, kBlockN, false,
                                    a + row * K, b + n * K, block, is_packed);
        for (int64_t r = 0; r < m; ++r) {
          const C* found = block + r * kBlockN;
          const auto value = [&](int64_t j) {
            Vec v = load_float(found + j);
            if constexpr (is_int8) {
              v = v - Vec(row_zeros[row + r]) * Vec::loadu(code_sums + n + j);
              v = v * (Vec(row_steps[row + r]) * Vec::loadu(steps + n + j));
            }
            return activate(v + Vec::loadu(biases + n + j));
          };
          Out* to = out + (row + r) * stride + n;
          Out* place = width == kBlockN ? to : last_columns;
          for (int64_t j = 0; j < kBlockN; j += 2 * Vec::size())
            store_pair(value(j), value(j + Vec::size()), place + j);
          if (place != to) std::memcpy(to, last_columns, width * sizeof(Out));
        }
      }
      at::native::cpublas::brgemm_release(is_packed);
    });
  }
};

}  // namespace moe_dist
