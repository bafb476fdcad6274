/* Of which sources a library is: the fingerprint (kernel_sources.py) that the build passes in. */

#include "common.h"

EXPORT const char *sources(void) { return SOURCES; }
