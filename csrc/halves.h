// Conversions between stored 16-bit floats and f32: exact to f32, rounded to nearest from f32.
#pragma once

#include <cstdint>
#include <cstring>

#include "row/host_device.h"

namespace cudfast {
namespace {

CUDFAST_HD inline float widen_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  uint32_t bits = magnitude + 0x38000000u;            // exponent bias 15 -> 127
  if (magnitude >= 0x0f800000u) bits += 0x38000000u;  // inf, NaN
  float f;
  if (magnitude < 0x00800000u) {  // zero, subnormal: exact by a subtraction
    bits = magnitude + 0x38800000u;
    std::memcpy(&f, &bits, 4);
    f -= 0x1p-14f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

CUDFAST_HD inline uint16_t narrow_half(float f) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more: inf
  if (bits < 0x38800000u) {                                               // subnormal: rounded by an addition
    float small;
    std::memcpy(&small, &bits, 4);
    small += 0.5f;
    std::memcpy(&bits, &small, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

CUDFAST_HD inline float widen_bfloat(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

CUDFAST_HD inline uint16_t narrow_bfloat(float f) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
}  // namespace cudfast
