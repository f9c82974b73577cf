// The hash of the sources that an extension was built from (hpkernels/common/sources.py), by which a source tree finds
// out that it was built from others.
#pragma once

namespace hpk {

extern const char* const kSourceHash;

}  // namespace hpk
