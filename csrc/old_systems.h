// Lets a library that is built on a new system load on one with glibc 2.28 and libstdc++ of GCC 8, the oldest that
// torch itself supports. Without it three names of glibc and two of libstdc++ would ask for a newer one. Nothing here
// changes what the code does; `ci/repair.sh` says which policy the wheel reaches.
#pragma once

#include <dlfcn.h>

#include <sstream>

// glibc 2.34 moved these from libdl to libc and gave them its version; the older names go on working.
#if defined(__x86_64__)
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver dlopen,dlopen@GLIBC_2.17");
__asm__(".symver dlsym,dlsym@GLIBC_2.17");
#endif

// glibc 2.32: by it std::shared_ptr leaves out atomics in a process with one thread. Ours says that there are several.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

// GCC 9: before it these constructors were not in libstdc++.so. So each library has its own,
// hidden, because the linker would export what libstdc++ has under a version of its own.
template __attribute__((visibility("hidden"))) std::ostringstream::basic_ostringstream();
template __attribute__((visibility("hidden"))) std::stringstream::basic_stringstream();
