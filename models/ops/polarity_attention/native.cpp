// What is not a matrix product of polarity attention on a CPU, one pass over a block each: features and their pull-back,
// the division by the normalisers and its own. native.py builds and calls it; README.md has the equations.
//
// Letters: b images, h heads, T tokens and d channels per head of a block; W numbers in a vector.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

namespace {
using at::Tensor;
template <class T> using Vec = at::vec::Vectorized<T>;

// log2(0): 2 to any power of it that is at least 1 is 0, and 0 times it is 0
constexpr double LOG_OF_ZERO = -1100;

// A row of channels for each token of (b, h, T, ·), whatever its strides; channels are neighbours in memory.
template <class T> struct Rows {
  T* data;
  int64_t image, head, token;
  explicit Rows(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())), image(t.stride(0)), head(t.stride(1)), token(t.stride(2)) {}
  T* at(int64_t b, int64_t h, int64_t n) const { return data + b * image + h * head + n * token; }
};

// work(part, b, n, h) for every token and head; parts of at most `length` tokens of an image are shared by all threads,
// and a part goes through memory as queries and keys lie there: token by token, all heads
template <class F> void over_tokens(const Tensor& like, int64_t length, const F& work) {
  const int64_t H = like.size(1), N = like.size(2), parts = (N + length - 1) / length;
  at::parallel_for(0, like.size(0) * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t b = part / parts, first = part % parts * length;
      for (int64_t n = first; n < std::min(N, first + length); ++n) {
        for (int64_t h = 0; h < H; ++h) work(part, b, h, n);
      }
    }
  });
}

// u = token / scale, log2|u| and |u|^(p−1) of W channels; NaN stays NaN
template <class T> struct Sharpened {
  Vec<T> u, log, slope;
  template <class X> Sharpened(const X* token, const T* factor, const T* power_less_1, int64_t count) {
    T scaled[Vec<T>::size()] = {};
    for (int64_t c = 0; c < count; ++c) scaled[c] = static_cast<T>(token[c]) * factor[c];
    u = Vec<T>::loadu(scaled);
    log = at::vec::maximum(u.abs().log2(), Vec<T>(T(LOG_OF_ZERO)));
    slope = (Vec<T>::loadu(power_less_1, count) * log).exp2();
  }
};

// [relu(u)^p, relu(−u)^p] of x (b, h, T, d) into out (b, h, T, 2d); factor is 1/scale, power p − 1, (h, d) each
template <class T, class X>
void features(const Tensor& x, const Tensor& factor, const Tensor& power, const Tensor& out, int64_t length) {
  const Rows<X> tokens(x);
  const Rows<T> results(out);
  const T *factors = factor.const_data_ptr<T>(), *powers = power.const_data_ptr<T>();
  const int64_t d = x.size(3), W = Vec<T>::size();
  over_tokens(x, length, [&](int64_t, int64_t b, int64_t h, int64_t n) {
    const Vec<T> zero(T(0));
    for (int64_t c = 0; c < d; c += W) {
      const int64_t count = std::min(W, d - c), at = h * d + c;
      const Sharpened<T> s(tokens.at(b, h, n) + c, factors + at, powers + at, count);
      const Vec<T> size = s.slope * s.u.abs();
      T* result = results.at(b, h, n) + c;
      Vec<T>::blendv(size, zero, s.u <= zero).store(result, count);
      Vec<T>::blendv(size, zero, s.u >= zero).store(result + d, count);
    }
  });
}

// From the gradient of the features to that of x, into out; adds to moments (parts, 2, h, d) Σ u·∂/∂u without the factor
// p over a part's tokens, and the same with each term times log2|u|
template <class T, class X>
void features_backward(const Tensor& x, const Tensor& factor, const Tensor& power, const Tensor& grad,
                       const Tensor& out, const Tensor& moments, int64_t length) {
  const Rows<X> tokens(x);
  const Rows<T> grads(grad), results(out);
  const T *factors = factor.const_data_ptr<T>(), *powers = power.const_data_ptr<T>();
  const int64_t d = x.size(3), channels = x.size(1) * d, W = Vec<T>::size();
  T* sums = moments.data_ptr<T>();
  over_tokens(x, length, [&](int64_t part, int64_t b, int64_t h, int64_t n) {
    const Vec<T> zero(T(0)), one(T(1));
    for (int64_t c = 0; c < d; c += W) {
      const int64_t count = std::min(W, d - c), at = h * d + c;
      const Sharpened<T> s(tokens.at(b, h, n) + c, factors + at, powers + at, count);
      const T* own = grads.at(b, h, n) + c;
      Vec<T> chosen = Vec<T>::blendv(Vec<T>::loadu(own, count), Vec<T>::loadu(own + d, count).neg(), s.u < zero);
      chosen = Vec<T>::blendv(chosen, zero, s.u == zero) * s.slope;
      const Vec<T> outer = (Vec<T>::loadu(powers + at, count) + one) * Vec<T>::loadu(factors + at, count);
      (chosen * outer).store(results.at(b, h, n) + c, count);
      const Vec<T> moment = chosen * s.u;
      T* sum = sums + part * 2 * channels + at;
      (Vec<T>::loadu(sum, count) + moment).store(sum, count);
      (Vec<T>::loadu(sum + channels, count) + moment * s.log).store(sum + channels, count);
    }
  });
}

// Numerators of each stream over its normaliser + eps; a stream ends before the channel `ends` names
template <class T, class X>
void divide(const Tensor& numerators, const Tensor& normalisers, at::IntArrayRef ends, double eps, const Tensor& out,
            int64_t length) {
  const Rows<T> tops(numerators), bottoms(normalisers);
  const Rows<X> results(out);
  over_tokens(out, length, [&](int64_t, int64_t b, int64_t h, int64_t n) {
    const T* top = tops.at(b, h, n);
    X* result = results.at(b, h, n);
    int64_t c = 0;
    for (size_t stream = 0; stream < ends.size(); ++stream) {
      const T bottom = bottoms.at(b, h, n)[stream] + T(eps);
      for (; c < ends[stream]; ++c) result[c] = static_cast<X>(top[c] / bottom);
    }
  });
}

// Gradients of numerators and normalisers from that of their quotients, into out (b, h, T, channels + streams)
template <class T, class X>
void divide_backward(const Tensor& numerators, const Tensor& normalisers, at::IntArrayRef ends, double eps,
                     const Tensor& grad, const Tensor& out, int64_t length) {
  const Rows<T> tops(numerators), bottoms(normalisers), results(out);
  const Rows<X> grads(grad);
  const int64_t channels = grad.size(3), W = Vec<T>::size();
  over_tokens(grad, length, [&](int64_t, int64_t b, int64_t h, int64_t n) {
    const T* top = tops.at(b, h, n);
    const X* own = grads.at(b, h, n);
    T* result = results.at(b, h, n);
    int64_t start = 0;
    for (size_t stream = 0; stream < ends.size(); start = ends[stream++]) {
      const T bottom = bottoms.at(b, h, n)[stream] + T(eps);
      for (int64_t c = start; c < ends[stream]; ++c) result[c] = static_cast<T>(own[c]) / bottom;
      Vec<T> sums(T(0));
      for (int64_t c = start; c < ends[stream]; c += W) {
        const int64_t count = std::min(W, ends[stream] - c);
        sums = sums + Vec<T>::loadu(top + c, count) * Vec<T>::loadu(result + c, count);
      }
      const auto add = [](Vec<T> a, Vec<T> b) { return a + b; };
      result[channels + stream] = -at::vec::vec_reduce_all<T>(add, sums) / bottom;
    }
  });
}

// X, the numbers that are given, are those of t; T, what is computed with, is float or, for double, double
#define BY_TYPE(t, ...)                                                                                        \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (t).scalar_type(), "polarity_attention", [&] {     \
    using X = scalar_t;                                                                                        \
    using T = std::conditional_t<std::is_same_v<X, double>, double, float>;                                    \
    __VA_ARGS__;                                                                                               \
  })

// For tensors without memory, as tracers and planners of memory compute with: results have their shapes already
void nothing(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}
}  // namespace

TORCH_LIBRARY(polaformer_native, m) {
  m.def("features(Tensor x, Tensor factor, Tensor power, Tensor(a!) out, int length) -> ()");
  m.def("features_backward(Tensor x, Tensor factor, Tensor power, Tensor grad, Tensor(a!) out, Tensor(b!) moments,"
        " int length) -> ()");
  m.def("divide(Tensor numerators, Tensor normalisers, int[] ends, float eps, Tensor(a!) out, int length) -> ()");
  m.def("divide_backward(Tensor numerators, Tensor normalisers, int[] ends, float eps, Tensor grad, Tensor(a!) out,"
        " int length) -> ()");
}

TORCH_LIBRARY_IMPL(polaformer_native, CPU, m) {
  m.impl("features", [](const Tensor& x, const Tensor& factor, const Tensor& power, Tensor out, int64_t length) {
    BY_TYPE(x, (features<T, X>(x, factor, power, out, length)));
  });
  m.impl("features_backward", [](const Tensor& x, const Tensor& factor, const Tensor& power, const Tensor& grad,
                                 Tensor out, Tensor moments, int64_t length) {
    BY_TYPE(x, (features_backward<T, X>(x, factor, power, grad, out, moments, length)));
  });
  m.impl("divide", [](const Tensor& numerators, const Tensor& normalisers, at::IntArrayRef ends, double eps, Tensor out,
                      int64_t length) {
    BY_TYPE(out, (divide<T, X>(numerators, normalisers, ends, eps, out, length)));
  });
  m.impl("divide_backward", [](const Tensor& numerators, const Tensor& normalisers, at::IntArrayRef ends, double eps,
                               const Tensor& grad, Tensor out, int64_t length) {
    BY_TYPE(grad, (divide_backward<T, X>(numerators, normalisers, ends, eps, grad, out, length)));
  });
}

TORCH_LIBRARY_IMPL(polaformer_native, Meta, m) {
  for (const char* name : {"features", "features_backward", "divide", "divide_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&nothing>());
  }
}
