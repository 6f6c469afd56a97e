// Vectors of floats in GCC's and Clang's extensions: one text for AVX-512, AVX2 and NEON.
// ops/_cpu.py compiles this file, then those of the kernels, as one.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using i64 = int64_t;

// Floats per vector; rows of x per register tile, by the number of registers.
#if defined(__AVX512F__)
constexpr int VL = 16, MAX_M = 6;
#elif defined(__AVX2__) && defined(__F16C__)
constexpr int VL = 8, MAX_M = 2;
#elif defined(__aarch64__)
constexpr int VL = 4, MAX_M = 5;
#else
#error "no vector conversion of float16 is known for this CPU"  // ops/_cpu.py goes without
#endif
constexpr int NG = 4;        // weight rows w[:, g] per register tile, where H is contiguous
constexpr int NH = 4;        // steps of h per register tile, where G is contiguous
constexpr int BLOCK_G = 64;  // features per task; where G is contiguous, a multiple of it
constexpr int BLOCK_R = 64;  // rows per pass over a task's weights

// Into L2, not L1: on Zen 4 that reads 28 to 30 GB/s where a prefetch into L1 reads 21 to 25, and
// where to prefetch matters little (2 to 16 KiB ahead in a stream, 4 to 16 steps of h ahead).
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)
constexpr int AHEAD_BYTES = 4096, AHEAD_STEPS = 8;

typedef float V __attribute__((vector_size(VL * 4)));
typedef uint32_t VI __attribute__((vector_size(VL * 4)));
typedef uint16_t VH __attribute__((vector_size(VL * 2)));
typedef float V4 __attribute__((vector_size(16)));
typedef int32_t V4I __attribute__((vector_size(16)));

template <class A>
static inline A load(const void* p) {
  A a;
  memcpy(&a, p, sizeof(A));
  return a;
}

// `wide` reads VL elements as floats; `narrow` writes VL floats, each rounded once.
struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

static inline V wide(const float* p) { return load<V>(p); }
static inline V wide(const bf16* p) { return (V)(__builtin_convertvector(load<VH>(p), VI) << 16); }
static inline void narrow(float* p, V v) { memcpy(p, &v, sizeof v); }
static inline void narrow(bf16* p, V v) {
  VI u = (VI)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, is_nan = (VI)(v != v);
  VH h = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), VH);
  memcpy((void*)p, &h, sizeof h);
}
#if defined(__AVX512F__)
static inline V wide(const half* p) { return (V)_mm512_cvtph_ps(load<__m256i>(p)); }
static inline void narrow(half* p, V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
static inline V wide(const half* p) { return (V)_mm256_cvtph_ps(load<__m128i>(p)); }
static inline void narrow(half* p, V v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
typedef __fp16 VF16 __attribute__((vector_size(VL * 2)));
static inline V wide(const half* p) { return __builtin_convertvector(load<VF16>(p), V); }
static inline void narrow(half* p, V v) {
  VF16 h = __builtin_convertvector(v, VF16);
  memcpy((void*)p, &h, sizeof h);
}
#endif

template <class T>
static inline V wide(const T* p, i64 n) {  // the first n < VL elements, then zeros
  T part[VL] = {};
  memcpy((void*)part, p, n * sizeof(T));
  return wide(part);
}
template <class T>
static inline void narrow(T* p, V v, i64 n) {
  T part[VL];
  narrow(part, v);
  memcpy((void*)p, part, n * sizeof(T));
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, V4I{__VA_ARGS__})
#endif

static inline V4 fold(V v) {
  V4 part[VL / 4];
  memcpy(part, &v, sizeof v);
  for (int i = 1; i < VL / 4; i++) part[0] += part[i];
  return part[0];
}
static inline V4 sums(const V* v) {  // of each of four vectors
  V4 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
  V4 ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
  V4 cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
  return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
}

template <class F>
static void with_dtype(i64 dtype, F f) {
  if (dtype == 0) f(float{});
  else if (dtype == 1) f(half{});
  else f(bf16{});
}
