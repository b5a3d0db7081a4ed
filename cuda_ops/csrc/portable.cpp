// What lets a wheel that is linked here run with the C and C++ libraries of manylinux_2_28. Linked in such wheels alone
// (PORTABLE_VARIABLE in cuda_ops/_build.py), with --wrap for each function below.
#if defined(__linux__) && defined(__x86_64__)

#include <new>
#include <sstream>

// Of functions that were moved between glibc's files, or made anew, the version that every glibc has.
// Each stands in a section of its own, which the linker leaves out where nothing calls it.
#define SSM_OLD_GLIBC(name, version)                                               \
  __asm__(".section .text.__wrap_" #name                                           \
          ",\"ax\",@progbits\n"                                                    \
          ".globl __wrap_" #name "\n.hidden __wrap_" #name "\n.type __wrap_" #name \
          ", @function\n"                                                          \
          "__wrap_" #name ":\n  jmp old_" #name                                    \
          "@PLT\n"                                                                 \
          ".symver old_" #name ", " #name "@" #version "\n.text\n");
#include "portable_functions.inc"
#undef SSM_OLD_GLIBC

// Read by libstdc++'s reference counts; glibc has it since 2.32. 0 means that there may be several threads.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// In libstdc++ since GCC 9 and 11.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

#endif
