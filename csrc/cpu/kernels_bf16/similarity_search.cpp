#include "cpu/kernels/search.h"
#include "cpu/kernels_bf16/screen_bf16.h"

namespace hpk::HPK_ISA {

void max_similarity(const MaxArgs<float>& args) { max_similarity_with<ScreenBf16>(args); }
void topk_similarity(const TopkArgs<float>& args) { topk_similarity_with<ScreenBf16>(args); }
void pairs_above(const PairsArgs<float>& args) { PairsSearch<ScreenBf16>(args).run(); }

}  // namespace hpk::HPK_ISA
