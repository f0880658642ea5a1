// Preloaded, it stands before the C library: of the calls that change files below a folder, the n-th fails or ends the
// process, whoever makes it: Python, Pillow's encoders, torch's C++ or safetensors' Rust.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long nth, seen;
static int number;
static const char* hit_call = "";

// number  the errno of the n-th call; 0 ends the process there
void failing_calls_begin(const char* below, long n, int with) {
  strncpy(folder, below, sizeof folder - 1);
  nth = n, number = with, seen = 0, hit_call = "";
}

void failing_calls_end(void) { folder[0] = 0; }
const char* failing_calls_hit(void) { return hit_call; }

static int hit(const char* call, const char* path) {
  if (!folder[0] || strncmp(path, folder, strlen(folder)) || ++seen != nth) return 0;
  hit_call = call;
  if (!number) _exit(9);
  errno = number;
  return 1;
}

static const char* path_of(int descriptor, const char* name) {  // of a descriptor alone, or of a name below it
  static char path[8192];
  char link[64];
  int kept = errno;
  if (name && (name[0] == '/' || descriptor == AT_FDCWD)) return name;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, 4095);
  path[length < 0 ? 0 : length] = 0;
  if (name) strcat(strcat(path, "/"), name);
  errno = kept;
  return path;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(type, name, failed, path, parameters, ...)           \
  type name parameters {                                          \
    return hit(#name, path) ? failed : REAL(name)(__VA_ARGS__);   \
  }
#define OPEN(name, below, parameters, ...)                                                   \
  int name parameters {                                                                      \
    va_list rest;                                                                            \
    va_start(rest, flags);                                                                   \
    int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0;                      \
    va_end(rest);                                                                            \
    int writes = flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR);                            \
    return writes && hit(#name, path_of(below, path)) ? -1 : REAL(name)(__VA_ARGS__, mode);  \
  }

OPEN(open, AT_FDCWD, (const char* path, int flags, ...), path, flags)
OPEN(open64, AT_FDCWD, (const char* path, int flags, ...), path, flags)
OPEN(openat, at, (int at, const char* path, int flags, ...), at, path, flags)
OPEN(openat64, at, (int at, const char* path, int flags, ...), at, path, flags)
CALL(FILE*, fopen, NULL, path, (const char* path, const char* mode), path, mode)
CALL(FILE*, fopen64, NULL, path, (const char* path, const char* mode), path, mode)
CALL(ssize_t, write, -1, path_of(to, NULL), (int to, const void* data, size_t n), to, data, n)
CALL(ssize_t, pwrite64, -1, path_of(to, NULL), (int to, const void* data, size_t n, off64_t at), to, data, n, at)
CALL(ssize_t, writev, -1, path_of(to, NULL), (int to, const struct iovec* parts, int n), to, parts, n)
CALL(int, fsync, -1, path_of(of, NULL), (int of), of)
CALL(int, fdatasync, -1, path_of(of, NULL), (int of), of)
CALL(int, ftruncate64, -1, path_of(of, NULL), (int of, off64_t n), of, n)
CALL(int, rename, -1, from, (const char* from, const char* to), from, to)
CALL(int, renameat, -1, path_of(a, from), (int a, const char* from, int b, const char* to), a, from, b, to)
CALL(int, renameat2, -1, path_of(a, from), (int a, const char* from, int b, const char* to, unsigned how), a, from, b,
     to, how)
CALL(int, link, -1, to, (const char* from, const char* to), from, to)
CALL(int, linkat, -1, path_of(b, to), (int a, const char* from, int b, const char* to, int how), a, from, b, to, how)
CALL(int, unlink, -1, path, (const char* path), path)
CALL(int, unlinkat, -1, path_of(at, path), (int at, const char* path, int how), at, path, how)
CALL(int, rmdir, -1, path, (const char* path), path)
CALL(int, mkdir, -1, path, (const char* path, mode_t mode), path, mode)
CALL(int, mkdirat, -1, path_of(at, path), (int at, const char* path, mode_t mode), at, path, mode)
