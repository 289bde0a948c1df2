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
constexpr int kWide = 4;        // vectors of a block of columns, at most
constexpr int kMaxRows = 6;     // of a block
constexpr int kFewRows = 8;     // for as many a matrix is read where it lies, for more it is packed
constexpr int64_t kDepth = 64;  // rows of a matrix that are packed at once
constexpr int64_t kAhead = 4;   // rows of it that are fetched before their use
// Columns that are computed together, at most. The longer the pieces that lie together in memory,
// the faster they are read: 512 floats twice as fast as 32.
constexpr int64_t kStripe = 512;

// The vectors of a block of columns, so that its sums stay in registers: of which AVX-512 has 32,
// others 16.
constexpr int most_wide(int rows) { return kLanes == 16 || rows <= 2 ? kWide : 2; }

constexpr int kPanel = most_wide(kMaxRows) * kLanes;  // columns of a packed panel

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

// Call block(Wide as a constant, first column) over columns [begin, end) for blocks of `Rows` rows:
// whole vectors, at most most_wide(Rows) at a time.
template <int Rows, typename Block>
void over_columns(int64_t begin, int64_t end, const Block& block) {
  constexpr int Most = most_wide(Rows);
  while (begin < end) {
    const int64_t left = (end - begin) / kLanes;
    if (left >= Most) {
      block(std::integral_constant<int, Most>{}, begin);
      begin += Most * kLanes;
    } else if (left >= 2) {
      block(std::integral_constant<int, 2>{}, begin);
      begin += 2 * kLanes;
    } else {
      block(std::integral_constant<int, 1>{}, begin);
      begin += kLanes;
    }
  }
}

// Rows of sums that a thread keeps.
struct Sums {
  std::vector<float> values;
  std::vector<float*> rows;

  // `count` rows of zeros.
  float* const* zeros(int64_t count, int64_t width) {
    values.assign(count * width, 0.0f);
    rows.resize(count);
    for (int64_t r = 0; r < count; ++r) rows[r] = values.data() + r * width;
    return rows.data();
  }
};

// sums[r][0:width] += sum over s of x[r][d + s] * w[s][0:width], for `Rows` rows and `Steps` s.
template <int Rows, int Steps>
inline void stream_steps(const float* const* x, int64_t d, const float* w, int64_t stride,
                         int64_t width, float* const* sums) {
  Vec x_rs[Rows][Steps];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < Steps; ++s) x_rs[r][s] = all(x[r][d + s]);
  }
  for (int64_t at = 0; at < width; at += kLanes) {
    Vec sum[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) sum[r] = load(sums[r] + at);
#pragma GCC unroll 8
    for (int s = 0; s < Steps; ++s) {
      const float* w_s = w + s * stride + at;
      __builtin_prefetch(w_s + kAhead * stride);
      const Vec own = load(w_s);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r] = fused(x_rs[r][s], own, sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) store(sums[r] + at, sum[r]);
  }
}

// Add the products of a few rows to their sums, which stay in the first cache, as do the `Steps`
// rows of the matrix that all of them read.
template <int Steps>
inline void stream(int64_t rows, const float* const* x, const float* w, int64_t depth,
                   int64_t stride, int64_t width, float* const* sums) {
  for (int64_t d = 0; d + Steps <= depth; d += Steps, w += Steps * stride) {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
      stream_steps<2, Steps>(x + r, d, w, stride, width, sums + r);
    }
    if (r < rows) stream_steps<1, Steps>(x + r, d, w, stride, width, sums + r);
  }
}

// Copy [depth, width], whose rows lie `stride` apart, to panels of [depth, kPanel]; the last one
// has the columns that are left.
inline void pack_panels(const float* w, int64_t depth, int64_t stride, int64_t width, float* to) {
  for (int64_t d = 0; d < depth; ++d, w += stride) {
    for (int64_t at = 0; at < width; at += kPanel) {
      const int64_t columns = std::min<int64_t>(kPanel, width - at);
      float* panel = to + at * depth + d * columns;
      for (int64_t c = 0; c < columns; c += kLanes) {
        __builtin_prefetch(w + kAhead * stride + at + c);  // beyond the matrix it does nothing
        store(panel + c, load(w + at + c));
      }
    }
  }
}

// Add the products of rows with panels to their sums.
inline void multiply_panels(int64_t rows, const float* const* x, int64_t from, const float* panels,
                            int64_t depth, int64_t width, float* const* sums) {
  for (int64_t begin = 0; begin < width; begin += kPanel) {
    const int64_t columns = std::min<int64_t>(kPanel, width - begin);
    const float* panel = panels + begin * depth;
    over_rows(rows, [&](auto some, int64_t first) {
      constexpr int Rows = decltype(some)::value;
      const float* own[Rows];
      for (int r = 0; r < Rows; ++r) own[r] = x[first + r] + from;
      over_columns<Rows>(0, columns, [&](auto wide, int64_t at) {
        constexpr int Wide = decltype(wide)::value;
        Vec sum[Rows][Wide];
        for (int r = 0; r < Rows; ++r) {
          const float* before = sums[first + r] + begin + at;
          for (int v = 0; v < Wide; ++v) sum[r][v] = load(before + v * kLanes);
        }
        multiply_block<Rows, Wide, true>(own, panel + at, depth, columns, sum);
        for (int r = 0; r < Rows; ++r) {
          float* after = sums[first + r] + begin + at;
          for (int v = 0; v < Wide; ++v) store(after + v * kLanes, sum[r][v]);
        }
      });
    });
  }
}

// sums[r][0:width] += x[r] * w[0:depth][0:width], whose rows lie `stride` apart; the width is whole
// vectors. What is summed for a number, and in which order, does not depend on the other rows.
inline void multiply_rows(int64_t rows, const float* const* x, const float* w, int64_t depth,
                          int64_t stride, int64_t width, float* const* sums) {
  constexpr int kSteps = 4;
  if (rows <= kFewRows && depth % kSteps == 0) {
    return stream<kSteps>(rows, x, w, depth, stride, width, sums);
  }
  thread_local std::vector<float> panels;
  panels.resize(kDepth * width);
  for (int64_t d = 0; d < depth; d += kDepth) {
    const int64_t some = std::min(kDepth, depth - d);
    pack_panels(w + d * stride, some, stride, width, panels.data());
    multiply_panels(rows, x, d, panels.data(), some, width, sums);
  }
}

}  // namespace
