// Instruction sets: what this CPU offers, which one runs, and how an op is declared and called once per set.
//
// A kernel source csrc/cpu/<op>/*.isa.cpp is compiled several times, each time with -DHPK_ISA=<set>, and puts its
// functions into namespace hpk::HPK_ISA. Its header declares them for every compiled set with HPK_DECLARE, and code
// that is compiled once (csrc/cpu/<op>/bindings.h) calls the one for this machine with HPK_DISPATCH:
//
//     // csrc/cpu/my_op/my_op.h
//     HPK_DECLARE(void my_op(const MyArgs<float>& args); void my_op(const MyArgs<double>& args);)
//     // csrc/cpu/my_op/kernels.isa.cpp
//     namespace hpk::HPK_ISA { void my_op(const MyArgs<float>& args) { ... } ... }
//     // csrc/cpu/my_op/bindings.h
//     HPK_DISPATCH(my_op(args));
#pragma once

#include <string>
#include <vector>

namespace hpk {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

Isa isa();                              // the set in use: the best supported one, or a lower one that was asked for
void set_isa(const std::string& name);  // throws std::invalid_argument for a set this machine or build lacks
const char* isa_name(Isa isa);
std::vector<std::string> supported_isas();  // from the oldest to the newest

}  // namespace hpk

#ifdef HPK_HAVE_AVX2
#define HPK_DECLARE_AVX2(...) \
  namespace hpk::avx2 {       \
  __VA_ARGS__                 \
  }
#define HPK_CALL_AVX2(...) \
  if (hpk::isa() == hpk::Isa::avx2) return hpk::avx2::__VA_ARGS__;
#else
#define HPK_DECLARE_AVX2(...)
#define HPK_CALL_AVX2(...)
#endif

#ifdef HPK_HAVE_AVX512
#define HPK_DECLARE_AVX512(...) \
  namespace hpk::avx512 {       \
  __VA_ARGS__                   \
  }
#define HPK_CALL_AVX512(...) \
  if (hpk::isa() >= hpk::Isa::avx512) return hpk::avx512::__VA_ARGS__;
#else
#define HPK_DECLARE_AVX512(...)
#define HPK_CALL_AVX512(...)
#endif

#define HPK_DECLARE(...)    \
  namespace hpk::baseline { \
  __VA_ARGS__               \
  }                         \
  HPK_DECLARE_AVX2(__VA_ARGS__) HPK_DECLARE_AVX512(__VA_ARGS__)
#define HPK_DISPATCH(...) \
  [&] { HPK_CALL_AVX512(__VA_ARGS__) HPK_CALL_AVX2(__VA_ARGS__) return hpk::baseline::__VA_ARGS__; }()
