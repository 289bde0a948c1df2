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

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kWide = 4;                      // vectors of a block of columns
constexpr int kColumns = kLanes * kWide;      // of a block
constexpr int kMaxRows = kLanes == 16 ? 6 : 2;  // of a block: its sums stay in registers

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4)));

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec all(float value) { return value - Vec{}; }  // compiles to one broadcast

// exp by a polynomial on [-ln 2 / 2, ln 2 / 2], relative error below 2e-7.
inline Vec exp_of(Vec x) {
  const Vec low = all(-87.0f), high = all(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec scaled = x * 1.44269504f;
  const Vec half = scaled < 0.0f ? all(-0.5f) : all(0.5f);
  const IntVec power = __builtin_convertvector(scaled + half, IntVec);
  const Vec whole = __builtin_convertvector(power, Vec);
  const Vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec sum = all(1.9875691500e-4f);
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const IntVec bits = (power + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
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

}  // namespace
