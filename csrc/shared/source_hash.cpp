// Alone in a file: it is compiled anew with every change of any source.
#include "shared/source_hash.h"

#ifndef HPK_SOURCE_HASH
#define HPK_SOURCE_HASH ""
#endif

namespace hpk {

const char* const kSourceHash = HPK_SOURCE_HASH;

}  // namespace hpk
