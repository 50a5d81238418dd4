// Elementary functions over lanes, and loads of what is shorter than sixteen. Included inside a tier's namespace, after its lane header.

namespace {

inline Floats load_tail(const float* p, size_t left) {
  if (left >= kLanes) return load(p);
  float padded[kLanes] = {};
  for (size_t i = 0; i < left; ++i) padded[i] = p[i];
  return load(padded);
}

inline void store_tail(float* p, Floats a, size_t left) {
  if (left >= kLanes) return store(p, a);
  float padded[kLanes];
  store(padded, a);
  for (size_t i = 0; i < left; ++i) p[i] = padded[i];
}

// e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a degree-6 polynomial for e^r (Cephes' range reduction and
// coefficients). Below -87.3 the result is zero to float precision's smallest normal; above 88.7 it saturates.
inline Floats exponential(Floats x) {
  x = min(max(x, set1(-87.33654f)), set1(88.37626f));
  const Floats n = round_even(mul(x, set1(1.44269504088896341f)));
  Floats r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Floats p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale_by_power(p, n);
}

inline Floats relu(Floats x) { return max(x, zero()); }

inline Floats silu(Floats x) { return div(x, add(set1(1.0f), exponential(sub(zero(), x)))); }

// tanh(x) = 1 - 2 / (e^2x + 1)
inline Floats hyperbolic_tangent(Floats x) {
  const Floats one = set1(1.0f);
  return sub(one, div(set1(2.0f), add(exponential(add(x, x)), one)));
}

inline Floats gelu_tanh(Floats x) {
  const Floats cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
  const Floats t = hyperbolic_tangent(mul(cubic, set1(0.7978845608028654f)));
  return mul(mul(set1(0.5f), x), add(set1(1.0f), t));
}

// x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with erfc(a / sqrt 2) = e^(a h(a)) and h a polynomial. Its
// coefficients are a minimax fit of the error of x Phi(x) over [0, 6.2]; beyond, -h only has to grow, and where a is
// clamped the power is as good as zero. Within 2 ulp for positive x, within 3e-7 for negative x.
inline Floats gelu(Floats x) {
  const Floats a = min(abs(x), set1(14.0f));
  const Floats a2 = mul(a, a);  // Estrin's order: sums side by side, where Horner's would wait for each other
  const Floats low = fma(a2, fma(a, set1(4.9679787e-3f), set1(-3.6433440e-2f)), fma(a, set1(-3.1828558e-1f), set1(-7.9788655e-1f)));
  const Floats high = fma(a2, fma(a, set1(-1.4944469e-6f), set1(2.1805179e-5f)), fma(a, set1(-1.0381877e-4f), set1(-1.5330558e-4f)));
  const Floats h = fma(mul(a2, a2), high, low);
  return fnma(mul(set1(0.5f), a), exponential(mul(h, a)), max(zero(), x));  // max(0, NaN) is NaN
}

}  // namespace
