// The CPU kernel of route. Letters are those of ops/route.py.

struct Route {  // as ops/_cpu.py packs it
  void* weights;
  i64* ids;
  const void *logits, *bias;
  i64 dtype_weights, dtype_logits, dtype_bias, T, E, K, stride, softmax, sigmoid, score_first;
  i64 num_groups, top_groups, per_group, renormalize, threads;
  double eps, scale;
};

typedef std::pair<float, i64> Candidate;

// The best k of n in order, by the algorithms that torch.topk uses on a CPU: which of two equal
// scores it takes follows from them, and a router must take the same.
static void select_best(Candidate* c, i64 n, i64 k) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return (a.first != a.first && b.first == b.first) || a.first > b.first;
  };
  if (k * 64 <= n) {
    std::partial_sort(c, c + k, c + n, better);
  } else {
    std::nth_element(c, c + k - 1, c + n, better);
    std::sort(c, c + k - 1, better);
  }
}

static void score(const Route& a, float* x, i64 n) {
  if (a.softmax) {
    const float high = *std::max_element(x, x + n);
    double sum = 0;
    for (i64 i = 0; i < n; i++) sum += x[i] = std::exp(x[i] - high);
    for (i64 i = 0; i < n; i++) x[i] = (float)(x[i] / sum);
  } else if (a.sigmoid) {
    for (i64 i = 0; i < n; i++) x[i] = 1.0f / (1.0f + std::exp(-x[i]));
  }
}

// -infinity for every expert outside the best groups.
static void keep_groups(const Route& a, float* choice, Candidate* c, Candidate* groups) {
  const i64 P = a.num_groups, size = a.E / P;
  for (i64 p = 0; p < P; p++) {
    for (i64 i = 0; i < size; i++) c[i] = {choice[p * size + i], i};
    select_best(c, size, a.per_group);
    float total = 0;
    for (i64 i = 0; i < a.per_group; i++) total += c[i].first;
    groups[p] = {total, p};
  }
  select_best(groups, P, a.top_groups);
  for (i64 i = a.top_groups; i < P; i++)
    std::fill_n(choice + groups[i].second * size, size, -std::numeric_limits<float>::infinity());
}

template <class T>
static void to_floats(const T* from, float* to, i64 n) {
  i64 i = 0;
  for (; i + VL <= n; i += VL) narrow(to + i, wide(from + i));
  if (i < n) narrow(to + i, wide(from + i, n - i), n - i);
}

extern "C" int moe_route(const Route* args) {
  const Route& a = *args;
  const i64 threads = std::min(a.threads, 1 + a.T * a.E / 4096);  // 4096: about 20 us
#pragma omp parallel num_threads((int)threads) if (threads > 1)
  {
    std::unique_ptr<float[]> floats(new float[3 * a.E + a.K]);
    std::unique_ptr<Candidate[]> candidates(new Candidate[a.E + a.num_groups]);
    float *scores = floats.get(), *choice = scores + a.E, *bias = choice + a.E, *w = bias + a.E;
    Candidate *c = candidates.get(), *groups = c + a.E;
    if (a.bias) with_dtype(a.dtype_bias, [&](auto t) {
      to_floats((const decltype(t)*)a.bias, bias, a.E);
    });
#pragma omp for
    for (i64 t = 0; t < a.T; t++) {
      with_dtype(a.dtype_logits, [&](auto type) {
        to_floats((const decltype(type)*)a.logits + t * a.stride, scores, a.E);
      });
      if (a.score_first) score(a, scores, a.E);
      for (i64 e = 0; e < a.E; e++) choice[e] = a.bias ? scores[e] + bias[e] : scores[e];
      if (a.num_groups > 1) keep_groups(a, choice, c, groups);
      for (i64 e = 0; e < a.E; e++) c[e] = {choice[e], e};
      select_best(c, a.E, a.K);
      for (i64 k = 0; k < a.K; k++) w[k] = scores[a.ids[t * a.K + k] = c[k].second];
      if (!a.score_first) score(a, w, a.K);
      double total = a.eps;
      for (i64 k = 0; k < a.K; k++) total += w[k];
      for (i64 k = 0; k < a.K; k++) {
        const float weight = (float)((a.renormalize ? w[k] / total : w[k]) * a.scale);
        with_dtype(a.dtype_weights, [&](auto type) {
          narrow((decltype(type)*)a.weights + t * a.K + k, V{} + weight, 1);
        });
      }
    }
  }
  return 0;
}
