// Products of rows with a weight that was packed once: float32, bfloat16, or int8 with a scale for
// each row and each output. Shapes: T rows, K inputs, N outputs.
#pragma once

#include "activations.h"
#include "block_product.h"
#include "few_rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

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

// A row in which something is no number, or infinite, gets a scale that is none.
template <typename From>
void encode_row(const From* x, int64_t K, uint8_t* codes, float* scale, float* zero) {
  constexpr int kChains = 4;  // one chain would wait for itself
  Vec low[kChains], high[kChains], nothing(0.f);
  for (int i = 0; i < kChains; ++i) low[i] = high[i] = Vec(0.f);
  const auto look = [&](int64_t k, int chain) {
    const Vec v = load_float(x + k);
    low[chain] = at::vec::clamp_max(v, low[chain]);
    high[chain] = at::vec::clamp_min(v, high[chain]);
    nothing = at::vec::fmadd(v, Vec(0.f), nothing);
  };
  int64_t k = 0;
  for (; k + kChains * Vec::size() <= K; k += kChains * Vec::size())
    for (int i = 0; i < kChains; ++i) look(k + i * Vec::size(), i);
  for (; k + Vec::size() <= K; k += Vec::size()) look(k, 0);
  for (int i = 1; i < kChains; ++i) {
    low[0] = at::vec::minimum(low[0], low[i]);
    high[0] = at::vec::maximum(high[0], high[i]);
  }
  float smallest = reduce_min(low[0]), largest = reduce_max(high[0]), none = reduce_sum(nothing);
  for (; k < K; ++k) {
    const float value = x[k];
    smallest = std::min(smallest, value);
    largest = std::max(largest, value);
    none += value * 0.f;
  }
  const float step = std::max((largest - smallest) / 255.f, 1e-20f);
  *scale = step + none;
  *zero = std::nearbyint(-smallest / step);
  to_codes(x, K, 1.f / step, *zero, codes);
}

inline void encode_row(const float* x, int64_t K, at::BFloat16* codes) { to_bfloat16(x, K, codes); }
inline void encode_row(const at::BFloat16* x, int64_t K, at::BFloat16* codes) { std::memcpy(codes, x, K * sizeof(*x)); }
inline void encode_row(const float* x, int64_t K, float* codes) { std::memcpy(codes, x, K * sizeof(float)); }
inline void encode_row(const at::BFloat16* x, int64_t K, float* codes) { at::vec::convert(x, codes, K); }

// One row as codes of a precision; scale and zero are of int8 alone.
template <typename From>
void encode_row(const From* x, int64_t K, Precision precision, void* codes, float* scale, float* zero) {
  if (precision == Precision::kFloat)
    encode_row(x, K, static_cast<float*>(codes));
  else if (precision == Precision::kBFloat16)
    encode_row(x, K, static_cast<at::BFloat16*>(codes));
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
      to_bfloat16(from + first * K, (last - first) * K, to + first * K);
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
  Tensor packed;       // (blocks, K / v and more, kBlockN, v), where v inputs lie together
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
    // Up to whole tiles, as a block's product wants it.
    const int64_t words = K / together, room = (words + 15) / 16 * 16;
    packed = at::zeros({all, room, kBlockN, together}, padded.options().dtype(type));
    packed.narrow(1, 0, words).copy_(padded.to(type).view({all, kBlockN, words, together}).transpose(1, 2));
    block_bytes_ = room * kBlockN * 4;
    weights_ = static_cast<const char*>(packed.const_data_ptr());
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
    const int64_t read = codes.storage_offset() + rounded_rows(codes.size(0), true) * K;
    TORCH_CHECK(static_cast<int64_t>(codes.storage().nbytes()) >= read * codes.element_size(),
                "rows without room to be rounded up");
    const int64_t T = codes.size(0), row_blocks = (T + kBlockM - 1) / kBlockM;
    at::parallel_for(0, blocks * row_blocks, 1, [&](int64_t first, int64_t last) {
      const BlockProducts products(precision == Precision::kFloat);
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i / blocks * kBlockM;
        apply_block(i % blocks, row_codes(rows, row), std::min(kBlockM, T - row), out + row * stride,
                    stride, activation);
      }
    });
  }

  // The same of all outputs of some rows in this thread, a block of outputs after the other: so its
  // weights are read once for all of the rows.
  template <typename Out>
  void apply_rows(const RowCodes& rows, int64_t T, Out* out, int64_t stride, int64_t activation = -1) const {
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t row = 0; row < T; row += kBlockM)
        apply_block(block, from_row(rows, row), std::min(kBlockM, T - row), out + row * stride, stride, activation);
  }

  // The same of one block of outputs and at most `kBlockM` rows; the first output of all lies at
  // `out`. A thread has its `BlockProducts`.
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

  // Rows of this product from one on.
  RowCodes from_row(const RowCodes& rows, int64_t row) const {
    const int64_t bytes = row * K * c10::elementSize(code_type(precision));
    return {static_cast<const char*>(rows.codes) + bytes, rows.scale ? rows.scale + row : nullptr,
            rows.zero ? rows.zero + row : nullptr};
  }

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

  // Sums of a block's products, and `after` as of `multiply_block`.
  template <typename A, typename B, typename C, typename After>
  void multiply(int64_t block, const void* a, int64_t T, C* c, After&& after) const {
    constexpr int64_t together = 4 / sizeof(A);
    const A* rows = static_cast<const A*>(a);
    const B* weights = reinterpret_cast<const B*>(weights_ + block * block_bytes_);
    if (!multiply_few(T, rows, weights, K / together, c))
      return multiply_block(T, kBlockN, K, K, kBlockN * 4, kBlockN, rows, weights, c, after);
    for (int64_t column = 0; column < kBlockN; column += kPartN) after(0, T, column);
  }

  template <typename A, typename B, typename C, typename Out>
  void run(int64_t block, const RowCodes& rows, int64_t T, Out* out, int64_t stride, int64_t activation) const {
    alignas(64) C found[kBlockM * kBlockN], gates[kBlockM * kBlockN];
    alignas(64) Out last_columns[kBlockM * kBlockN];
    const int64_t own = is_gated ? 2 * block + 1 : block;
    const int64_t n = block * kBlockN, width = std::min(kBlockN, N - n);
    Out* to = width == kBlockN ? out + n : last_columns;
    const int64_t step = width == kBlockN ? stride : kBlockN;
    if (is_gated) multiply<A, B>(own - 1, rows.codes, T, gates, [](int64_t, int64_t, int64_t) {});
    with_activation(activation, [&](const auto& activate) {
      multiply<A, B>(own, rows.codes, T, found, [&](int64_t first_row, int64_t end, int64_t column) {
        for (int64_t j = column; j < column + kPartN; j += 2 * Vec::size()) {
          const Columns<C> first(*this, own, j), second(*this, own, j + Vec::size());
          if (is_gated) {
            const Columns<C> gate_1(*this, own - 1, j), gate_2(*this, own - 1, j + Vec::size());
            for (int64_t r = first_row; r < end; ++r)
              store_pair(activate(gate_1(gates, rows, r)) * first(found, rows, r),
                         activate(gate_2(gates, rows, r)) * second(found, rows, r), to + r * step + j);
          } else {
            for (int64_t r = first_row; r < end; ++r)
              store_pair(activate(first(found, rows, r)), activate(second(found, rows, r)), to + r * step + j);
          }
        }
      });
    });
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
        return at::vec::fmadd(v - Vec(rows.zero[r]) * code_sums, Vec(rows.scale[r]) * steps, bias);
      return v + bias;
    }
  };

  // Of the tensors above.
  const char* weights_ = nullptr;
  int64_t block_bytes_ = 0;
  const float *biases_ = nullptr, *steps_ = nullptr, *code_sums_ = nullptr;
};

}  // namespace moe_dist
