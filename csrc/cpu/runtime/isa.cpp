#include "cpu/runtime/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hpk {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (leaf <= __get_cpuid_max(0, nullptr)) __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
  return r;
}

unsigned long long enabled_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool bit(unsigned value, int index) { return (value >> index) & 1; }

// The CPU must have the instructions and the operating system must save the registers (XCR0).
Isa detect() {
  [[maybe_unused]] const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const bool osxsave = bit(one.c, 27);
  [[maybe_unused]] const unsigned long long state = osxsave ? enabled_state() : 0;
  Isa best = Isa::baseline;
#ifdef HPK_HAVE_AVX2
  const bool bmi = bit(seven.b, 3) && bit(seven.b, 8) && bit(one.c, 23) && bit(one.c, 29);
  if ((state & 0x6) != 0x6 || !bit(one.c, 28) || !bit(one.c, 12) || !bit(seven.b, 5) || !bmi) return best;
  best = Isa::avx2;
#ifdef HPK_HAVE_AVX512
  const bool f_dq_bw_vl = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);
  if ((state & 0xe6) != 0xe6 || !f_dq_bw_vl) return best;
  best = Isa::avx512;
#ifdef HPK_HAVE_AVX512_BF16
  if (bit(seven_one.a, 5) && bit(seven.c, 11)) best = Isa::avx512_bf16;
#endif
#endif
#endif
  return best;
}
#else
Isa detect() { return Isa::baseline; }
#endif

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa parse(const std::string& name, const char* source) {
  std::string known;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
    known += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::invalid_argument(std::string(source) + " is '" + name + "', expected one of: " + known);
}

std::atomic<int>& current() {
  static std::atomic<int> value = [] {
    const char* name = std::getenv("HPKERNELS_CPU_ISA");
    return static_cast<int>(name && *name ? parse(name, "HPKERNELS_CPU_ISA") : best_isa());
  }();
  return value;
}

}  // namespace

Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void set_isa(const std::string& name) { current().store(static_cast<int>(parse(name, "the instruction set"))); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> supported_isas() { return {kNames, kNames + static_cast<int>(best_isa()) + 1}; }

}  // namespace hpk
