#include "cpu/similarity_search/max_similarity.h"
#include "cpu/similarity_search/pairs_above.h"
#include "cpu/similarity_search/topk_similarity.h"

namespace hpk::HPK_ISA {

void max_similarity(const MaxArgs<float>& args) { max_similarity_with<ScreenExact<float>>(args); }
void max_similarity(const MaxArgs<double>& args) { max_similarity_with<ScreenExact<double>>(args); }
void topk_similarity(const TopkArgs<float>& args) { topk_similarity_with<ScreenExact<float>>(args); }
void topk_similarity(const TopkArgs<double>& args) { topk_similarity_with<ScreenExact<double>>(args); }
void pairs_above(const PairsArgs<float>& args) { PairsSearch<ScreenExact<float>>(args).run(); }
void pairs_above(const PairsArgs<double>& args) { PairsSearch<ScreenExact<double>>(args).run(); }

}  // namespace hpk::HPK_ISA
