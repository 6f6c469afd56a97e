// The CPU kernels of combine and sort_tokens. Letters are those of the ops.

struct Combine {  // as ops/_cpu.py packs it
  void* out;
  const void *y, *weights;
  const int32_t* position;
  i64 dtype_out, dtype_y, dtype_weights, T, K, R, H, stride_y, threads;
};

template <class Y, class Out>
static void combine(const Combine& a, const float* weights) {
  const i64 threads = std::min(a.threads, 1 + a.T * a.K * a.H / 32768);  // 32768: about 5 us
  const i64 blocks = a.T < threads ? threads : 1;
  const i64 width = (a.H + blocks * VL - 1) / (blocks * VL) * VL;
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
  for (i64 task = 0; task < a.T * blocks; task++) {
    const i64 t = task / blocks, first = task % blocks * width;
    const int32_t* position = a.position + t * a.K;
    Out* out = (Out*)a.out + t * a.H;
    for (i64 h = first; h < std::min(first + width, a.H); h += VL) {
      const i64 n = std::min<i64>(VL, a.H - h);
      V sum = {};
      for (i64 k = 0; k < a.K; k++) {
        if (position[k] < 0) continue;
        const Y* y = (const Y*)a.y + position[k] * a.stride_y + h;
        sum += (n == VL ? wide(y) : wide(y, n)) * weights[t * a.K + k];
      }
      if (n == VL) narrow(out + h, sum);
      else narrow(out + h, sum, n);
    }
  }
}

// Returns 0, or 1 where a position is out of range; then nothing is written.
extern "C" int moe_combine(const Combine* args) {
  const Combine& a = *args;
  std::unique_ptr<float[]> weights(new float[a.T * a.K]);
  for (i64 i = 0; i < a.T * a.K; i++)
    if (a.position[i] >= a.R) return 1;
  with_dtype(a.dtype_weights, [&](auto type) {
    for (i64 i = 0; i < a.T * a.K; i++)
      weights[i] = wide((const decltype(type)*)a.weights + i, 1)[0];
  });
  with_dtype(a.dtype_y, [&](auto y) {
    with_dtype(a.dtype_out,
               [&](auto out) { combine<decltype(y), decltype(out)>(a, weights.get()); });
  });
  return 0;
}

struct SortTokens {  // as ops/_cpu.py packs it
  int32_t *rows, *offsets, *position;
  const void* ids;
  i64 ids_are_long, R, E;
};

// A counting sort; pairs of no expert come last, in order.
template <class Id>
static void sort_tokens(const SortTokens& a) {
  const Id* ids = (const Id*)a.ids;
  const auto expert = [&](i64 r) { return ids[r] >= 0 && ids[r] < a.E ? (i64)ids[r] : a.E; };
  std::unique_ptr<int32_t[]> next(new int32_t[a.E + 1]());
  for (i64 r = 0; r < a.R; r++) next[expert(r)]++;
  int32_t start = 0;
  for (i64 e = 0; e <= a.E; e++) {
    const int32_t count = next[e];
    next[e] = start;
    start += count;
    if (e < a.E) a.offsets[e] = start;
  }
  for (i64 r = 0; r < a.R; r++) {
    const i64 e = expert(r);
    a.rows[next[e]] = (int32_t)r;
    a.position[r] = e < a.E ? next[e] : -1;
    next[e]++;
  }
}

extern "C" int moe_sort_tokens(const SortTokens* args) {
  if (args->ids_are_long) sort_tokens<i64>(*args);
  else sort_tokens<int32_t>(*args);
  return 0;
}
