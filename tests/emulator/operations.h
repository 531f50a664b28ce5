// The operations of PTX that the machine knows, by the names that emulator.py gives them, and what they compute.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using pred = bool;
using u128 = unsigned __int128;
using s128 = __int128;

// -------------------------------------------------------------------------------------------------------------- values

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
struct bf16x2 {
  bf16 lo, hi;
};
struct f16x2 {
  f16 lo, hi;
};
struct f32x2 {
  f32 lo, hi;
};

template <class T>
inline T as(u64 x) {
  T t;
  memcpy(&t, &x, sizeof t);
  return t;
}
template <>
inline bool as<bool>(u64 x) {
  return x & 1;
}
template <class T>
inline u64 bits(T t) {
  u64 x = 0;
  memcpy(&x, &t, sizeof t);
  return x;
}

inline f32 nan_of_gpu() { return as<f32>(0x7fffffff); }
inline f32 canon(f32 x) { return x != x ? nan_of_gpu() : x; }
inline f64 canon(f64 x) { return x != x ? as<f64>(0x7fffffffffffffffull) : x; }
inline f32 ftz(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline f32 wide(f32 x) { return x; }
inline f64 wide(f64 x) { return x; }
inline f32 wide(bf16 x) { return as<f32>(u64(x.bits) << 16); }
inline f32 wide(f16 x) { return f32(as<_Float16>(x.bits)); }
template <class T>
inline T narrow(f32 x);
template <>
inline f32 narrow<f32>(f32 x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(f32 x) {
  if (x != x) return {0x7fff};
  u32 b = bits(x);
  return {u16((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}
template <>
inline f16 narrow<f16>(f32 x) {
  return x != x ? f16{0x7fff} : f16{u16(bits(_Float16(x)))};
}

// min and max of PTX: a NaN loses, or wins and is canonical; -0 < +0
template <class T>
inline T pick(T a, T b, bool larger, bool nan_wins) {
  auto x = wide(a), y = wide(b);
  if (x != x || y != y) {
    if (nan_wins || (x != x && y != y)) return narrow<T>(nan_of_gpu());
    return x != x ? b : a;
  }
  bool first = x == y ? std::signbit(x) != larger : (x > y) == larger;
  return first ? a : b;
}

template <class T>
inline T shift_left(T x, u32 n) {
  return n >= sizeof(T) * 8 ? T(0) : T(x << n);
}
template <class T>
inline T shift_right(T x, u32 n) {
  if (n >= sizeof(T) * 8) return x < 0 ? T(-1) : T(0);
  return x >> n;
}
inline u32 prmt(u32 a, u32 b, u32 selector) {
  u64 all = u64(b) << 32 | a;
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    u32 s = selector >> 4 * k & 15, byte = all >> 8 * (s & 7) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * k;
  }
  return r;
}
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (int k = 0; k < 8; k++)
    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}
inline u32 bfe_u(u32 a, u32 at, u32 n) { return n == 0 || at > 31 ? 0 : n > 31 ? a >> at : a >> at & ((1u << n) - 1); }
inline s32 bfe_s(u32 a, u32 at, u32 n) {
  if (n == 0) return 0;
  u32 top = std::min<u32>(at + n - 1, 31), sign = a >> top & 1, x = bfe_u(a, at, n), have = top - std::min(at, top) + 1;
  return sign && have < 32 ? s32(x | ~0u << have) : s32(x);
}
inline u32 bfi(u32 a, u32 b, u32 at, u32 n) {
  if (n == 0 || at > 31) return b;
  u32 mask = (n > 31 ? ~0u : (1u << n) - 1) << at;
  return (b & ~mask) | (a << at & mask);
}
inline u32 funnel(u32 lo, u32 hi, u32 n, bool left) {
  u64 x = u64(hi) << 32 | lo;
  return left ? u32(x << n >> 32) : u32(x >> n);
}
template <class T>
inline T to_integer(f64 x) {
  if (x != x) return 0;
  if (x <= f64(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= f64(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return T(x);
}

// -------------------------------------------------------------------------------------------- approximate instructions

// Correctly rounded, or as wrong as the PTX manual allows: a pseudo-random relative error, the same for the same input.
static s64 noisy;
inline f64 noise(u64 input) {  // in [-1, 1]
  u64 h = (input + noisy) * 0x9E3779B97F4A7C15ull;
  h ^= h >> 29;
  h *= 0xBF58476D1CE4E5B9ull;
  h ^= h >> 32;
  return f64(s64(h)) * 0x1p-63;
}
inline f32 off(f64 exact, u64 input, f64 most) {
  if (!noisy || exact != exact || exact == 0 || std::isinf(exact)) return canon(f32(exact));
  return f32(exact * (1 + most * noise(input)));
}
inline f32 ex2(f32 x) { return off(std::exp2(f64(x)), bits(x), x == 0 ? 0 : 0x1p-22); }
inline f32 lg2(f32 x) {  // between 0.5 and 2 the error is an absolute one
  f64 exact = x < 0 ? nan_of_gpu() : std::log2(f64(x));
  if (noisy && x > 0.5f && x < 2 && x != 1) return f32(exact + 0x1p-22 * noise(bits(x)));
  return off(exact, bits(x), 0x1p-22);
}
inline f32 rcp(f32 x) { return off(1 / f64(x), bits(x), 0x1p-23); }
inline f32 sqrt_approx(f32 x) { return off(std::sqrt(f64(x)), bits(x), 0x1p-23); }
inline f32 div_full(f32 a, f32 b) { return off(f64(a) / b, bits(a) * 3 + bits(b), 0x1p-22); }

// ---------------------------------------------------------------------------------------------------------- operations

// By name: O(name, result, operands ..., expression in a, b, c).

// clang-format off
#define COMPARE(O, T, s) \
  O(setp_eq_##s, pred, T, T, wide(a) == wide(b)) O(setp_ne_##s, pred, T, T, wide(a) < wide(b) || wide(a) > wide(b)) \
  O(setp_lt_##s, pred, T, T, wide(a) < wide(b)) O(setp_le_##s, pred, T, T, wide(a) <= wide(b)) \
  O(setp_gt_##s, pred, T, T, wide(a) > wide(b)) O(setp_ge_##s, pred, T, T, wide(a) >= wide(b)) \
  O(setp_equ_##s, pred, T, T, !(wide(a) < wide(b) || wide(a) > wide(b))) \
  O(setp_neu_##s, pred, T, T, wide(a) != wide(b)) O(setp_ltu_##s, pred, T, T, !(wide(a) >= wide(b))) \
  O(setp_leu_##s, pred, T, T, !(wide(a) > wide(b))) O(setp_gtu_##s, pred, T, T, !(wide(a) <= wide(b))) \
  O(setp_geu_##s, pred, T, T, !(wide(a) < wide(b))) \
  O(setp_num_##s, pred, T, T, wide(a) == wide(a) && wide(b) == wide(b)) \
  O(setp_nan_##s, pred, T, T, wide(a) != wide(a) || wide(b) != wide(b))
#define COMPARE_INTEGER(O, T, s) \
  O(setp_eq_##s, pred, T, T, a == b) O(setp_ne_##s, pred, T, T, a != b) O(setp_lt_##s, pred, T, T, a < b) \
  O(setp_le_##s, pred, T, T, a <= b) O(setp_gt_##s, pred, T, T, a > b) O(setp_ge_##s, pred, T, T, a >= b)
#define MIN_MAX(O, T, s) \
  O(min_##s, T, T, T, pick(a, b, false, false)) O(max_##s, T, T, T, pick(a, b, true, false)) \
  O(min_NaN_##s, T, T, T, pick(a, b, false, true)) O(max_NaN_##s, T, T, T, pick(a, b, true, true))
#define MIN_MAX_PAIR(O, T, s) \
  O(min_##s, T, T, T, (T{pick(a.lo, b.lo, false, false), pick(a.hi, b.hi, false, false)})) \
  O(max_##s, T, T, T, (T{pick(a.lo, b.lo, true, false), pick(a.hi, b.hi, true, false)})) \
  O(min_NaN_##s, T, T, T, (T{pick(a.lo, b.lo, false, true), pick(a.hi, b.hi, false, true)})) \
  O(max_NaN_##s, T, T, T, (T{pick(a.lo, b.lo, true, true), pick(a.hi, b.hi, true, true)}))
#define INTEGERS(O, S, U, s, u, b_) \
  O(add_##s, U, U, U, U(a + b)) O(add_##u, U, U, U, U(a + b)) O(sub_##s, U, U, U, U(a - b)) \
  O(sub_##u, U, U, U, U(a - b)) O(mul_lo_##s, U, U, U, U(a * b)) O(mul_lo_##u, U, U, U, U(a * b)) \
  O(min_##s, S, S, S, std::min(a, b)) O(max_##s, S, S, S, std::max(a, b)) O(min_##u, U, U, U, std::min(a, b)) \
  O(max_##u, U, U, U, std::max(a, b)) O(shl_##b_, U, U, u32, shift_left(a, b)) \
  O(shr_##s, S, S, u32, shift_right(a, b)) O(shr_##u, U, U, u32, shift_right(a, b)) \
  O(shr_##b_, U, U, u32, shift_right(a, b)) COMPARE_INTEGER(O, S, s) COMPARE_INTEGER(O, U, u) \
  O(setp_eq_##b_, pred, U, U, a == b) O(setp_ne_##b_, pred, U, U, a != b)

#define UNARY(O) \
  O(abs_f32, u32, u32, a & 0x7fffffff) O(neg_f32, u32, u32, a ^ 0x80000000) \
  O(abs_ftz_f32, f32, f32, ftz(std::fabs(a))) O(neg_bf16, u16, u16, a ^ 0x8000) O(neg_f16, u16, u16, a ^ 0x8000) \
  O(abs_bf16, u16, u16, a & 0x7fff) O(abs_f16, u16, u16, a & 0x7fff) O(neg_bf16x2, u32, u32, a ^ 0x80008000) \
  O(abs_bf16x2, u32, u32, a & 0x7fff7fff) O(neg_f16x2, u32, u32, a ^ 0x80008000) \
  O(abs_f16x2, u32, u32, a & 0x7fff7fff) O(neg_s16, u16, u16, -a) O(neg_s32, u32, u32, -a) O(neg_s64, u64, u64, -a) \
  O(abs_s32, s32, s32, a < 0 ? s32(-u32(a)) : a) O(abs_s64, s64, s64, a < 0 ? s64(-u64(a)) : a) \
  O(not_pred, pred, pred, !a) O(not_b16, u16, u16, ~a) O(not_b32, u32, u32, ~a) O(not_b64, u64, u64, ~a) \
  O(popc_b32, u32, u32, __builtin_popcount(a)) O(popc_b64, u32, u64, __builtin_popcountll(a)) \
  O(clz_b32, u32, u32, a ? __builtin_clz(a) : 32) O(clz_b64, u32, u64, a ? __builtin_clzll(a) : 64) \
  O(mov_pred, pred, pred, a) O(mov_b8, u8, u8, a) O(mov_b16, u16, u16, a) O(mov_b32, u32, u32, a) \
  O(mov_b64, u64, u64, a) O(param_s8, s64, s8, a) O(param_s16, s64, s16, a) O(param_s32, s64, s32, a) \
  O(ex2_approx_ftz_f32, f32, f32, ftz(ex2(ftz(a)))) O(ex2_approx_f32, f32, f32, ex2(a)) \
  O(lg2_approx_ftz_f32, f32, f32, lg2(ftz(a))) O(lg2_approx_f32, f32, f32, lg2(a)) \
  O(rcp_approx_ftz_f32, f32, f32, ftz(rcp(ftz(a)))) O(rcp_rn_f32, f32, f32, canon(1 / a)) \
  O(rcp_rn_ftz_f32, f32, f32, ftz(canon(1 / ftz(a)))) O(sqrt_approx_ftz_f32, f32, f32, ftz(sqrt_approx(ftz(a)))) \
  O(sqrt_approx_f32, f32, f32, sqrt_approx(a)) O(sqrt_rn_f32, f32, f32, canon(std::sqrt(a))) \
  O(cvt_f32_bf16, f32, bf16, wide(a)) O(cvt_f32_f16, f32, f16, wide(a)) O(cvt_ftz_f32_bf16, f32, bf16, ftz(wide(a))) \
  O(cvt_rn_bf16_f32, bf16, f32, narrow<bf16>(a)) O(cvt_rn_f16_f32, f16, f32, narrow<f16>(a)) \
  O(cvt_f64_f32, f64, f32, f64(a)) O(cvt_rn_f32_f64, f32, f64, canon(f32(a))) O(cvt_rn_f32_s16, f32, s16, f32(a)) \
  O(cvt_rn_f32_u16, f32, u16, f32(a)) O(cvt_rn_f32_u8, f32, u8, f32(a)) O(cvt_rn_f32_s32, f32, s32, f32(a)) \
  O(cvt_rn_f32_u32, f32, u32, f32(a)) O(cvt_rn_f32_s64, f32, s64, f32(a)) O(cvt_rn_f32_u64, f32, u64, f32(a)) \
  O(cvt_rzi_s32_f32, s32, f32, to_integer<s32>(a)) O(cvt_rzi_u32_f32, u32, f32, to_integer<u32>(a)) \
  O(cvt_rzi_s64_f32, s64, f32, to_integer<s64>(a)) O(cvt_rzi_ftz_s32_f32, s32, f32, to_integer<s32>(ftz(a))) \
  O(cvt_s16_s8, s64, s8, a) O(cvt_s32_s8, s64, s8, a) O(cvt_s64_s8, s64, s8, a) O(cvt_u16_u8, u64, u8, a) \
  O(cvt_u32_u8, u64, u8, a) O(cvt_u64_u8, u64, u8, a) O(cvt_s32_s16, s64, s16, a) O(cvt_s64_s16, s64, s16, a) \
  O(cvt_u32_u16, u64, u16, a) O(cvt_u64_u16, u64, u16, a) O(cvt_u32_s16, s64, s16, a) O(cvt_s64_s32, s64, s32, a) \
  O(cvt_u64_u32, u64, u32, a) O(cvt_u64_s32, s64, s32, a) O(cvt_u16_u32, u16, u32, a) O(cvt_u16_u64, u16, u64, a) \
  O(cvt_u32_u64, u32, u64, a) O(cvt_s32_s64, u32, u64, a) O(cvt_u32_u32, u32, u32, a) O(cvt_s32_s32, u32, u32, a) \
  O(cvt_u8_u16, u8, u16, a) O(cvt_u8_u32, u8, u32, a) O(cvt_s8_s32, u64, s8, s64(a)) O(cvt_s16_s32, u16, u32, a)

#define BINARY(O) \
  INTEGERS(O, s16, u16, s16, u16, b16) INTEGERS(O, s32, u32, s32, u32, b32) INTEGERS(O, s64, u64, s64, u64, b64) \
  O(add_f32, f32, f32, f32, canon(a + b)) O(sub_f32, f32, f32, f32, canon(a - b)) \
  O(mul_f32, f32, f32, f32, canon(a * b)) O(add_rn_f32, f32, f32, f32, canon(a + b)) \
  O(sub_rn_f32, f32, f32, f32, canon(a - b)) O(mul_rn_f32, f32, f32, f32, canon(a * b)) \
  O(add_ftz_f32, f32, f32, f32, ftz(canon(ftz(a) + ftz(b)))) \
  O(sub_ftz_f32, f32, f32, f32, ftz(canon(ftz(a) - ftz(b)))) \
  O(mul_ftz_f32, f32, f32, f32, ftz(canon(ftz(a) * ftz(b)))) \
  O(add_rn_ftz_f32, f32, f32, f32, ftz(canon(ftz(a) + ftz(b)))) \
  O(mul_rn_ftz_f32, f32, f32, f32, ftz(canon(ftz(a) * ftz(b)))) O(add_f64, f64, f64, f64, canon(a + b)) \
  O(sub_f64, f64, f64, f64, canon(a - b)) O(mul_f64, f64, f64, f64, canon(a * b)) \
  O(add_rn_f32x2, f32x2, f32x2, f32x2, (f32x2{canon(a.lo + b.lo), canon(a.hi + b.hi)})) \
  O(mul_rn_f32x2, f32x2, f32x2, f32x2, (f32x2{canon(a.lo * b.lo), canon(a.hi * b.hi)})) \
  O(add_f32x2, f32x2, f32x2, f32x2, (f32x2{canon(a.lo + b.lo), canon(a.hi + b.hi)})) \
  O(mul_f32x2, f32x2, f32x2, f32x2, (f32x2{canon(a.lo * b.lo), canon(a.hi * b.hi)})) \
  O(sub_f32x2, f32x2, f32x2, f32x2, (f32x2{canon(a.lo - b.lo), canon(a.hi - b.hi)})) \
  O(add_rn_f32_bf16, f32, bf16, f32, canon(wide(a) + b)) O(sub_rn_f32_bf16, f32, bf16, f32, canon(wide(a) - b)) \
  O(add_f32_bf16, f32, bf16, f32, canon(wide(a) + b)) O(sub_f32_bf16, f32, bf16, f32, canon(wide(a) - b)) \
  O(add_rn_f32_f16, f32, f16, f32, canon(wide(a) + b)) O(sub_rn_f32_f16, f32, f16, f32, canon(wide(a) - b)) \
  O(add_f32_f16, f32, f16, f32, canon(wide(a) + b)) O(sub_f32_f16, f32, f16, f32, canon(wide(a) - b)) \
  O(div_rn_f32, f32, f32, f32, canon(a / b)) O(div_full_f32, f32, f32, f32, div_full(a, b)) \
  O(div_full_ftz_f32, f32, f32, f32, ftz(div_full(ftz(a), ftz(b)))) MIN_MAX(O, f32, f32) \
  MIN_MAX(O, bf16, bf16) MIN_MAX(O, f16, f16) MIN_MAX_PAIR(O, bf16x2, bf16x2) MIN_MAX_PAIR(O, f16x2, f16x2) \
  O(mul_hi_s32, s32, s32, s32, s64(a) * b >> 32) O(mul_hi_u32, u32, u32, u32, u64(a) * b >> 32) \
  O(mul_hi_s64, s64, s64, s64, s64(s128(a) * b >> 64)) O(mul_hi_u64, u64, u64, u64, u64(u128(a) * b >> 64)) \
  O(mul_wide_s32, s64, s32, s32, s64(a) * b) O(mul_wide_u32, u64, u32, u32, u64(a) * b) \
  O(mul_wide_s16, s32, s16, s16, s32(a) * b) O(mul_wide_u16, u32, u16, u16, u32(a) * b) \
  O(div_s32, s32, s32, s32, b == 0 ? -1 : s64(a) / b) O(div_u32, u32, u32, u32, b == 0 ? ~0u : a / b) \
  O(rem_s32, s32, s32, s32, b == 0 ? -1 : s64(a) % b) O(rem_u32, u32, u32, u32, b == 0 ? ~0u : a % b) \
  O(div_s64, s64, s64, s64, b == 0 ? -1 : s128(a) / b) O(div_u64, u64, u64, u64, b == 0 ? ~0ull : a / b) \
  O(rem_s64, s64, s64, s64, b == 0 ? -1 : s128(a) % b) O(rem_u64, u64, u64, u64, b == 0 ? ~0ull : a % b) \
  O(xor_pred, pred, pred, pred, a != b) O(xor_b16, u16, u16, u16, a ^ b) O(xor_b32, u32, u32, u32, a ^ b) \
  O(xor_b64, u64, u64, u64, a ^ b) \
  O(cvt_rn_bf16x2_f32, bf16x2, f32, f32, (bf16x2{narrow<bf16>(b), narrow<bf16>(a)})) \
  O(cvt_rn_f16x2_f32, f16x2, f32, f32, (f16x2{narrow<f16>(b), narrow<f16>(a)})) COMPARE(O, f32, f32) \
  COMPARE(O, bf16, bf16) COMPARE(O, f16, f16) COMPARE(O, f64, f64)

// a defined operand may settle the result: 0 of an and, all ones of an or
#define BITWISE(O) \
  O(and_pred, pred, a && b, !a, !b) O(or_pred, pred, a || b, a, b) O(and_b16, u16, u16(a & b), a == 0, b == 0) \
  O(and_b32, u32, a & b, a == 0, b == 0) O(and_b64, u64, a & b, a == 0, b == 0) \
  O(or_b16, u16, u16(a | b), u16(~a) == 0, u16(~b) == 0) O(or_b32, u32, a | b, ~a == 0, ~b == 0) \
  O(or_b64, u64, a | b, ~a == 0, ~b == 0)

#define TERNARY(O) \
  O(fma_rn_f32, f32, f32, f32, f32, canon(__builtin_fmaf(a, b, c))) \
  O(fma_rn_f64, f64, f64, f64, f64, canon(__builtin_fma(a, b, c))) \
  O(fma_rn_ftz_f32, f32, f32, f32, f32, ftz(canon(__builtin_fmaf(ftz(a), ftz(b), ftz(c))))) \
  O(fma_rn_f32_bf16, f32, bf16, bf16, f32, canon(__builtin_fmaf(wide(a), wide(b), c))) \
  O(fma_rn_f32_f16, f32, f16, f16, f32, canon(__builtin_fmaf(wide(a), wide(b), c))) \
  O(fma_rn_bf16x2, bf16x2, bf16x2, bf16x2, bf16x2, \
    (bf16x2{narrow<bf16>(canon(__builtin_fmaf(wide(a.lo), wide(b.lo), wide(c.lo)))), \
            narrow<bf16>(canon(__builtin_fmaf(wide(a.hi), wide(b.hi), wide(c.hi))))})) \
  O(fma_rn_f16x2, f16x2, f16x2, f16x2, f16x2, \
    (f16x2{narrow<f16>(canon(__builtin_fmaf(wide(a.lo), wide(b.lo), wide(c.lo)))), \
           narrow<f16>(canon(__builtin_fmaf(wide(a.hi), wide(b.hi), wide(c.hi))))})) \
  O(fma_rn_f32x2, f32x2, f32x2, f32x2, f32x2, \
    (f32x2{canon(__builtin_fmaf(a.lo, b.lo, c.lo)), canon(__builtin_fmaf(a.hi, b.hi, c.hi))})) \
  O(mad_lo_s16, u16, u16, u16, u16, u16(a * b + c)) O(mad_lo_s32, u32, u32, u32, u32, a * b + c) \
  O(mad_lo_u32, u32, u32, u32, u32, a * b + c) O(mad_lo_s64, u64, u64, u64, u64, a * b + c) \
  O(mad_wide_s32, u64, s32, s32, u64, u64(s64(a) * b) + c) O(mad_wide_u32, u64, u32, u32, u64, u64(a) * b + c) \
  O(prmt_b32, u32, u32, u32, u32, prmt(a, b, c)) O(bfe_u32, u32, u32, u32, u32, bfe_u(a, b & 255, c & 255)) \
  O(bfe_s32, s32, u32, u32, u32, bfe_s(a, b & 255, c & 255)) \
  O(shf_l_wrap_b32, u32, u32, u32, u32, funnel(a, b, c & 31, true)) \
  O(shf_r_wrap_b32, u32, u32, u32, u32, funnel(a, b, c & 31, false)) \
  O(shf_l_clamp_b32, u32, u32, u32, u32, funnel(a, b, std::min(c, 32u), true)) \
  O(shf_r_clamp_b32, u32, u32, u32, u32, funnel(a, b, std::min(c, 32u), false)) \
  O(max3_s32, s32, s32, s32, s32, std::max(std::max(a, b), c)) \
  O(max_f32_3, f32, f32, f32, f32, pick(pick(a, b, true, false), c, true, false)) \
  O(min_f32_3, f32, f32, f32, f32, pick(pick(a, b, false, false), c, false, false)) \
  O(max_NaN_f32_3, f32, f32, f32, f32, pick(pick(a, b, true, true), c, true, true)) \
  O(min_NaN_f32_3, f32, f32, f32, f32, pick(pick(a, b, false, true), c, false, true))

#define QUATERNARY(O) \
  O(lop3_b32, lop3(a, b, c, d)) O(bfi_b32, bfi(a, b, c & 255, d & 255))

// two predicates from two halves
#define PAIR(O, T, s) \
  O(setp_eq_##s, T, a == b) O(setp_ne_##s, T, a < b || a > b) O(setp_lt_##s, T, a < b) O(setp_le_##s, T, a <= b) \
  O(setp_gt_##s, T, a > b) O(setp_ge_##s, T, a >= b) O(setp_equ_##s, T, !(a < b || a > b)) \
  O(setp_neu_##s, T, a != b) O(setp_ltu_##s, T, !(a >= b)) O(setp_leu_##s, T, !(a > b)) \
  O(setp_gtu_##s, T, !(a <= b)) O(setp_geu_##s, T, !(a < b)) O(setp_num_##s, T, a == a && b == b) \
  O(setp_nan_##s, T, a != a || b != b)
#define PAIRS(O) \
  PAIR(O, bf16x2, bf16x2) PAIR(O, f16x2, f16x2)

#define SELECTS(O) \
  O(selp_b16) O(selp_b32) O(selp_b64) O(selp_f32) O(selp_f64) O(selp_u16) O(selp_s16) O(selp_u32) O(selp_s32) \
  O(selp_u64) O(selp_s64)

#define OTHERS(O) \
  O(pack_2) O(pack_4) O(unpack_2) O(unpack_4) O(ld) O(st) O(bra) O(ret) O(bar_sync) O(bar_warp_sync) O(nothing) \
  O(trap) O(ldmatrix) O(stmatrix) O(shfl_bfly) O(shfl_up) O(shfl_down) O(shfl_idx) O(vote_ballot) O(vote_any) \
  O(vote_all) O(redux_add) O(redux_min_s32) O(redux_max_s32) O(redux_min_u32) O(redux_max_u32) O(redux_and) \
  O(redux_or) O(redux_xor) O(redux_min_f32) O(redux_max_f32) O(redux_min_NaN_f32) O(redux_max_NaN_f32)
// clang-format on

enum Op {
#define O(name, ...) OP_##name,
  UNARY(O) BINARY(O) BITWISE(O) TERNARY(O) QUATERNARY(O) PAIRS(O) SELECTS(O) OTHERS(O)
#undef O
      OPS
};
static const char* const OP_NAMES =
#define O(name, ...) #name "\n"
    UNARY(O) BINARY(O) BITWISE(O) TERNARY(O) QUATERNARY(O) PAIRS(O) SELECTS(O) OTHERS(O)
#undef O
    ;
