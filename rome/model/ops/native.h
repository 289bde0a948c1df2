// Vectors and threads of the engine's forms for a CPU (native.py builds them).

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kWide = 4;                      // vectors of a block of columns
constexpr int kColumns = kLanes * kWide;      // of a block
constexpr int kAhead = 64;                    // rows of a matrix that are fetched before their use
constexpr int kMaxRows = kLanes == 16 ? 6 : 2;  // of a block: its sums stay in registers

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4)));

// Not memcpy: for some processors GCC copies halves by way of memory, fifteen times as slow.
inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }

inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

inline Vec all(float value) { return value - Vec{}; }  // compiles to one broadcast

// a * b + c, rounded once where the processor can. A compiler that may choose joins products and
// sums in one loop and not in another (GCC for AMD's processors), and then a row's bits depend on
// how many rows are computed with it: the library is built with -ffp-contract=off.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  float32x4_t left[2], right[2], sum[2];
  std::memcpy(left, &a, sizeof left);
  std::memcpy(right, &b, sizeof right);
  std::memcpy(sum, &c, sizeof sum);
  for (int half = 0; half < 2; ++half) sum[half] = vfmaq_f32(sum[half], left[half], right[half]);
  std::memcpy(&c, sum, sizeof sum);
  return c;
#else
  return a * b + c;
#endif
}

// exp by a polynomial on [-ln 2 / 2, ln 2 / 2], relative error below 2e-7.
inline Vec exp_of(Vec x) {
  const Vec low = all(-87.0f), high = all(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec scaled = x * 1.44269504f;
  const Vec half = scaled < 0.0f ? all(-0.5f) : all(0.5f);
  const IntVec power = __builtin_convertvector(scaled + half, IntVec);
  const Vec whole = __builtin_convertvector(power, Vec);
  const Vec rest = fused(whole, all(2.12194440e-4f), x - whole * 0.693359375f);
  Vec sum = all(1.9875691500e-4f);
  sum = fused(sum, rest, all(1.3981999507e-3f));
  sum = fused(sum, rest, all(8.3334519073e-3f));
  sum = fused(sum, rest, all(4.1665795894e-2f));
  sum = fused(sum, rest, all(1.6666665459e-1f));
  sum = fused(sum, rest, all(5.0000001201e-1f));
  sum = fused(sum * rest, rest, rest) + 1.0f;
  const IntVec bits = (power + 127) << 23;
  return sum * reinterpret_cast<const Vec&>(bits);
}

template <int Lanes>
struct Lane {
  typedef float Type __attribute__((vector_size(Lanes * 4), aligned(4)));
};

// Add the lanes, halves first, always in the same order.
template <int Lanes>
inline float add_lanes(typename Lane<Lanes>::Type value) {
  if constexpr (Lanes == 1) {
    return value[0];
  } else {
    typename Lane<Lanes / 2>::Type low, high;
    std::memcpy(&low, &value, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
    return add_lanes<Lanes / 2>(low + high);
  }
}

// Call work(0) ... work(count - 1) on the calling thread and on those of XLA's pool that are free.
// Nobody waits for a thread that has not begun.
void for_each(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto shared = std::make_shared<Shared>();
  const auto* unit = &work;  // not touched by a thread that comes after the last unit was taken
  auto take_all = [shared, count, unit] {
    for (;;) {
      const int64_t mine = shared->next.fetch_add(1);
      if (mine >= count) return;
      (*unit)(mine);
      shared->done.fetch_add(1);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, count - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(take_all));
  take_all();
  while (shared->done.load() < count) std::this_thread::yield();
}

// out[r][0:columns] = sum over d of x[r][d] * w[d][0:columns], for `Rows` rows. With `Onto` the
// sums begin from what `out` holds.
template <int Rows, int Wide, bool Onto = false>
inline __attribute__((always_inline)) void multiply_block(const float* const* x, const float* w,
                                                          int64_t depth, int64_t stride,
                                                          Vec out[Rows][Wide]) {
  const float* row[Rows];
  Vec sum[Rows][Wide];  // in registers
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    row[r] = x[r];
#pragma GCC unroll 8
    for (int v = 0; v < Wide; ++v) sum[r][v] = Onto ? out[r][v] : Vec{};
  }
  for (int64_t d = 0; d < depth; ++d, w += stride) {
    Vec w_row[Wide];
#pragma GCC unroll 8
    for (int v = 0; v < Wide; ++v) w_row[v] = load(w + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec x_r = all(row[r][d]);
#pragma GCC unroll 8
      for (int v = 0; v < Wide; ++v) sum[r][v] = fused(x_r, w_row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Wide; ++v) out[r][v] = sum[r][v];
  }
}

// Copy `columns` columns of `depth` rows that lie `stride` apart to rows that lie `width` apart.
inline void copy_columns(const float* from, int64_t stride, int64_t depth, int64_t columns,
                         int64_t width, float* to) {
  for (int64_t d = 0; d < depth; ++d, from += stride, to += width) {
    // Processors do not guess it: the next row is far. Beyond the matrix it does nothing.
    for (int64_t at = 0; at < columns; at += 16) __builtin_prefetch(from + kAhead * stride + at);
    std::memcpy(to, from, columns * sizeof(float));
  }
}

// Call block(Rows as a constant, first) with the Rows, at most Most, that are `rows`.
template <int Most, typename Block>
inline void over_some(int64_t rows, int64_t first, const Block& block) {
  if constexpr (Most > 1) {
    if (rows < Most) return over_some<Most - 1>(rows, first, block);
  }
  block(std::integral_constant<int, Most>{}, first);
}

// Call block<Rows> over `rows` rows, at most kMaxRows at a time: block(Rows as a constant, first).
template <typename Block>
void over_rows(int64_t rows, const Block& block) {
  for (int64_t first = 0; first < rows;) {
    const int64_t left = std::min<int64_t>(rows - first, kMaxRows);
    over_some<kMaxRows>(left, first, block);
    first += left;
  }
}

// Call block(Wide as a constant, first column) over columns [begin, end): whole vectors, at most
// kColumns at a time.
template <typename Block>
void over_columns(int64_t begin, int64_t end, const Block& block) {
  while (begin < end) {
    const int64_t left = (end - begin) / kLanes;
    if (left >= kWide) {
      block(std::integral_constant<int, kWide>{}, begin);
      begin += kColumns;
    } else if (left >= 2) {
      block(std::integral_constant<int, 2>{}, begin);
      begin += 2 * kLanes;
    } else {
      block(std::integral_constant<int, 1>{}, begin);
      begin += kLanes;
    }
  }
}

}  // namespace
